// Shared memory, and the copies to it that land late.
#include "machine.h"

#include <cstdlib>
#include <cstring>

namespace cusim {

namespace {

constexpr size_t kMargin = 1024;  // before and after each variable, and the alignment of the dynamic memory
constexpr size_t kStaticAlignment = 128, kStaticBytes = 48 << 10;
constexpr unsigned char kUnset = 0xFF;  // four of them are a NaN: what is read before it is written shows
constexpr size_t kMaxVariables = 32;

size_t round_up(size_t n, size_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Adds a variable after the ones that are there. The memory is the launching thread's, so that ThreadSanitizer does not
// take the first fiber that gets here for its owner.
Variable& add(Block& block, const void* tag, const char* name, size_t bytes) {
  const size_t start = round_up(block.memory_used, tag == nullptr ? kMargin : kStaticAlignment);
  block.memory_used = start + bytes + kMargin;
  unsigned char* base = block.memory.get() + start;
  unpoison(base, bytes);
  return block.variables.emplace_back(Variable{tag, name, base, bytes});
}

const Variable* find(const Block& block, const void* p, size_t bytes) {
  for (const Variable& variable : block.variables) {
    if (variable.contains(p, bytes)) return &variable;
  }
  return nullptr;
}

}  // namespace

void allocate_shared(Block& block, size_t dynamic_bytes) {
  const size_t margins = (kMaxVariables + 2) * (kMargin + kStaticAlignment);
  block.memory_bytes = round_up(2 * kMargin + dynamic_bytes + kStaticBytes + margins, kMargin);
  block.memory.reset(static_cast<unsigned char*>(std::aligned_alloc(kMargin, block.memory_bytes)));
  if (!block.memory) throw std::bad_alloc();
  memset(block.memory.get(), kUnset, block.memory_bytes);
  poison(block.memory.get(), block.memory_bytes);
  block.variables.reserve(kMaxVariables);
  block.memory_used = kMargin;
  add(block, nullptr, "(dynamic)", dynamic_bytes);
}

void* static_shared(const void* tag, const char* name, size_t bytes) {
  Block& block = *machine.current->block;
  for (const Variable& variable : block.variables) {
    if (variable.tag == tag) return variable.base;
  }
  size_t used = 0;
  for (const Variable& variable : block.variables) used += variable.tag == nullptr ? 0 : variable.bytes;
  if (used + bytes > kStaticBytes || block.variables.size() == kMaxVariables) {
    fail(std::string("more than 48 KiB, or 32 variables, of static shared memory: ") + name, Location::current());
  }
  return add(block, tag, name, bytes).base;
}

unsigned char* dynamic_shared() { return machine.current->block->variables.front().base; }

namespace {

// The first byte of [from, from + kMargin) that was written; kMargin: none.
size_t first_written(const unsigned char* from) {
  for (size_t i = 0; i < kMargin; i += sizeof(uint64_t)) {
    uint64_t word;
    __builtin_memcpy(&word, from + i, sizeof word);
    for (size_t j = 0; ~word != 0 && j < sizeof word; ++j) {
      if (from[i + j] != kUnset) return i + j;
    }
  }
  return kMargin;
}

}  // namespace

void check_margins(const Block& block, const Place& place) {
  const auto complain = [&](const Variable& variable, long byte) {
    fail(std::string("a write outside shared memory: ") + variable.name + " has " + std::to_string(variable.bytes) +
             " bytes, and byte " + std::to_string(byte) + " was written before " + place.what,
         place.at);
  };
  for (const Variable& variable : block.variables) {
    const size_t after = first_written(variable.base + variable.bytes);
    if (after < kMargin) complain(variable, static_cast<long>(variable.bytes + after));
    if (variable.tag != nullptr) continue;  // what lies before it is the margin of another
    const size_t before = first_written(variable.base - kMargin);
    if (before < kMargin) complain(variable, static_cast<long>(before) - static_cast<long>(kMargin));
  }
}

void check_shared(const void* p, size_t bytes, size_t alignment, const char* what, Location at) {
  if (find(*machine.current->block, p, bytes) == nullptr) {
    fail(std::string(what) + ": the address is outside the block's shared memory", at);
  }
  if (reinterpret_cast<uintptr_t>(p) % alignment != 0) fail(std::string(what) + ": misaligned", at);
}

// Not memcpy, which ThreadSanitizer would see as well, in this place and not in the kernel's.
void copy(void* to, const void* from, size_t bytes) {
  note_read(from, bytes);
  note_write(to, bytes);
  for (size_t i = 0; i < bytes; ++i) {
    static_cast<volatile unsigned char*>(to)[i] = static_cast<const unsigned char*>(from)[i];
  }
}

namespace {

void land(const Copy& c) {
  static constexpr unsigned char kZeros[16] = {};
  copy(c.to, c.from, c.source_bytes);
  copy(static_cast<unsigned char*>(c.to) + c.source_bytes, kZeros, c.bytes - c.source_bytes);
}

}  // namespace

void cp_async(void* shared, const void* global, int bytes, int source_bytes, Location at) {
  check_shared(shared, bytes, bytes, "cp_async", at);
  if (reinterpret_cast<uintptr_t>(global) % bytes != 0) fail("cp_async: misaligned source", at);
  if (source_bytes < 0 || source_bytes > bytes) fail("cp_async: more source bytes than bytes", at);
  const Copy c{shared, global, bytes, source_bytes};
  if (machine.random != 0 && draw() % 2 == 0) {
    land(c);
  } else {
    machine.current->copies.push_back(c);
  }
}

void cp_async_wait(size_t pending) {
  Thread& thread = *machine.current;
  if (thread.groups.size() <= pending) return;
  const size_t groups = thread.groups.size() - pending, end = thread.groups[groups - 1];
  for (size_t i = 0; i < end; ++i) land(thread.copies[i]);
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + end);
  thread.groups.erase(thread.groups.begin(), thread.groups.begin() + groups);
  for (size_t& group : thread.groups) group -= end;
}

}  // namespace cusim

namespace gpu {

void cp_async_commit() {
  cusim::Thread& thread = *cusim::machine.current;
  thread.groups.push_back(thread.copies.size());
}

}  // namespace gpu

#ifdef CUSIM_ADDRESS
// Called by AddressSanitizer before it reports: whose access it was.
extern "C" void __asan_on_error() {
  if (cusim::machine.current != nullptr) {
    fprintf(stderr, "cusim: invalid access in %s\n", cusim::describe(*cusim::machine.current).c_str());
  }
}
#endif
