// Which instruction set of those that the library was compiled for runs on this machine.
#pragma once

#include <initializer_list>
#include <string>

namespace fastrnn {

enum class CpuCapability { kDefault, kAvx2, kAvx512 };

// What a variable of the environment says, the first of the values where it is unset or empty. Throws std::invalid_argument
// for any other.
std::string setting(const char* variable, std::initializer_list<const char*> values);

// The best one that this machine has and FASTRNN_CPU_CAPABILITY (avx512, avx2, default) allows. Throws
// std::invalid_argument for any other value of the variable.
CpuCapability cpu_capability();

// Are there instructions for dot products of bfloat16 (AVX512_BF16; AMX never comes without) beside the capability in use?
bool has_bf16_dot();

// Is there an instruction for dot products of 8-bit integers (AVX512-VNNI) beside the capability in use?
bool has_int8_dot();

// Is this a processor that torch's library, MKL, was not written for, one that is not Intel's? It has no code for AVX-512
// there, and adds up all k of a product one after another.
bool library_is_foreign();

// Are large products faster by the kernels' own tiles than by the library? A foreign one takes twice as long on processors
// with AVX-512. FASTRNN_CPU_GEMM is auto, own or library. Throws std::invalid_argument for any other value.
bool own_gemm();

}  // namespace fastrnn
