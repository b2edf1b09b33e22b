// A stand-alone program of kernels: runs cases that lie in folders, the same on a GPU and emulated.
//
// A folder has case.txt, with the lines `entry NAME`, `number NAME VALUE` and `array NAME BYTES`, and for every array its
// bytes in NAME.bin. After the run every array's bytes are in NAME.out; where the case failed, error.txt says why.
#pragma once

#include <cstddef>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "gpu.h"

namespace program {

#ifdef __CUDACC__
inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}
inline void* allocate(size_t bytes) {
  void* p = nullptr;
  check(cudaMalloc(&p, bytes));
  return p;
}
inline void release(void* p) { cudaFree(p); }
inline void copy(void* to, const void* from, size_t bytes) { check(cudaMemcpy(to, from, bytes, cudaMemcpyDefault)); }
#else
inline void* allocate(size_t bytes) {
  return ::operator new(bytes, std::align_val_t(256));
}  // as aligned as cudaMalloc's
inline void release(void* p) { ::operator delete(p, std::align_val_t(256)); }
inline void copy(void* to, const void* from, size_t bytes) { memcpy(to, from, bytes); }
#endif

class Case {
 public:
  explicit Case(const std::filesystem::path& folder) : folder_(folder) {
    std::ifstream lines(folder / "case.txt");
    std::string kind, name;
    while (lines >> kind >> name) {
      if (kind == "entry") {
        entry = name;
      } else if (kind == "number") {
        lines >> numbers_[name];
      } else if (kind == "array") {
        size_t bytes = 0;
        lines >> bytes;
        std::vector<char> host(bytes);
        std::ifstream(folder / (name + ".bin"), std::ios::binary).read(host.data(), static_cast<long>(bytes));
        arrays_[name] = {allocate(bytes), bytes};
        copy(arrays_[name].data, host.data(), bytes);
      }
    }
  }
  ~Case() {
    for (auto& [name, array] : arrays_) release(array.data);
  }
  Case(const Case&) = delete;
  Case& operator=(const Case&) = delete;

  int number(const std::string& name) const { return numbers_.at(name); }
  bool has(const std::string& name) const { return arrays_.count(name) > 0; }
  // In the device's memory.
  template <class T>
  T* array(const std::string& name) const {
    return static_cast<T*>(arrays_.at(name).data);
  }
  void write_back() const {
    for (const auto& [name, array] : arrays_) {
      std::vector<char> host(array.bytes);
      copy(host.data(), array.data, array.bytes);
      std::ofstream(folder_ / (name + ".out"), std::ios::binary).write(host.data(), static_cast<long>(array.bytes));
    }
  }

  std::string entry;

 private:
  struct Array {
    void* data;
    size_t bytes;
  };
  std::filesystem::path folder_;
  std::map<std::string, int> numbers_;
  std::map<std::string, Array> arrays_;
};

using Entries = std::map<std::string, std::function<void(const Case&)>>;

// Runs the cases in the folders argv[1...]. Returns how many failed.
inline int run(int argc, char** argv, const Entries& entries) {
  int failures = 0;
  for (int i = 1; i < argc; ++i) {
    const std::filesystem::path folder = argv[i];
    try {
      const Case arguments(folder);
      entries.at(arguments.entry)(arguments);
#ifdef __CUDACC__
      check(cudaDeviceSynchronize());
#endif
      arguments.write_back();
    } catch (const std::exception& error) {
      ++failures;
      std::ofstream(folder / "error.txt") << error.what();
      std::fprintf(stderr, "%s: %s\n", argv[i], error.what());
    }
  }
  return failures;
}

}  // namespace program
