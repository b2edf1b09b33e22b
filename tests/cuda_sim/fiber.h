// A fiber: a stack of its own, and the switch to it, which the sanitizers are told of. (CUSIM_THREAD and CUSIM_ADDRESS:
// built for a program under that sanitizer. The emulator itself is never instrumented: it is no part of what is tested.)
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#ifdef CUSIM_THREAD
#include <sanitizer/tsan_interface.h>
#endif
#ifdef CUSIM_ADDRESS
#include <sanitizer/asan_interface.h>
#endif

namespace cusim {

// What ThreadSanitizer takes for synchronisation, and for accesses of the current fiber.
#ifdef CUSIM_THREAD
inline constexpr bool kThreadSanitizer = true;
extern "C" void __tsan_read_range(const void* p, size_t bytes);
extern "C" void __tsan_write_range(const void* p, size_t bytes);
inline void note_release(void* tag) { __tsan_release(tag); }
inline void note_acquire(void* tag) { __tsan_acquire(tag); }
inline void note_read(const void* p, size_t bytes) { __tsan_read_range(p, bytes); }
inline void note_write(const void* p, size_t bytes) { __tsan_write_range(p, bytes); }
#else
inline constexpr bool kThreadSanitizer = false;
inline void note_release(void*) {}
inline void note_acquire(void*) {}
inline void note_read(const void*, size_t) {}
inline void note_write(const void*, size_t) {}
#endif

#ifdef CUSIM_ADDRESS
inline void poison(void* p, size_t bytes) { __asan_poison_memory_region(p, bytes); }
inline void unpoison(void* p, size_t bytes) { __asan_unpoison_memory_region(p, bytes); }
#else
inline void poison(void*, size_t) {}
inline void unpoison(void*, size_t) {}
#endif

class Stack {
 public:
#if defined(CUSIM_THREAD) || defined(CUSIM_ADDRESS)
  static constexpr size_t kBytes = 256 << 10;  // instrumented frames are larger
#else
  static constexpr size_t kBytes = 64 << 10;
#endif
  Stack() {
    void* p = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<char*>(p);
  }
  ~Stack() {
    if (base_ != nullptr) munmap(base_, kBytes);
  }
  Stack(Stack&& other) noexcept : base_(other.base_) { other.base_ = nullptr; }
  Stack& operator=(Stack&&) = delete;

  char* base() const { return base_; }
  // Ready for another fiber: the last one never returned from its frames.
  void reset() {
    unpoison(base_, kBytes);
    *reinterpret_cast<uint64_t*>(base_) = kCanary;
  }
  bool overflown() const { return *reinterpret_cast<const uint64_t*>(base_) != kCanary; }

 private:
  static constexpr uint64_t kCanary = 0x5EED0F5EED0F5EEDull;
  char* base_;
};

#if defined(__x86_64__)
// Saves what a call must keep on the stack, the stack in *from; goes on where `to` was saved.
extern "C" void cusim_switch(void** from, void* to);
#endif

struct Fiber {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  const void* bottom = nullptr;  // of the stack; home's is learnt at the first switch away from it
  size_t bytes = 0;
  void* sanitizer = nullptr;

  void start(const Stack& stack, void (*entry)(), [[maybe_unused]] const char* name) {
    bottom = stack.base();
    bytes = Stack::kBytes;
#if defined(__x86_64__)
    constexpr int kSavedRegisters = 6;
    void** top = reinterpret_cast<void**>(stack.base() + Stack::kBytes);
    top[-1] = nullptr;  // where entry, which never does, would return to
    top[-2] = reinterpret_cast<void*>(entry);
    stack_pointer = top - 2 - kSavedRegisters;
#else
    getcontext(&context);
    context.uc_stack.ss_sp = stack.base();
    context.uc_stack.ss_size = Stack::kBytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
#endif
#ifdef CUSIM_THREAD
    sanitizer = __tsan_create_fiber(0);
    __tsan_set_fiber_name(sanitizer, name);
#endif
  }
  // unfinished: it never came to say that home goes on after it.
  void destroy([[maybe_unused]] Fiber& home, [[maybe_unused]] bool unfinished) {
#ifdef CUSIM_THREAD
    constexpr unsigned kInOrder = 0;
    if (unfinished) {
      __tsan_switch_to_fiber(sanitizer, __tsan_switch_to_fiber_no_sync);
      __tsan_switch_to_fiber(home.sanitizer, kInOrder);
    }
    __tsan_destroy_fiber(sanitizer);
#endif
  }
  // ends: this fiber is never switched to again.
  void switch_to(Fiber& to, [[maybe_unused]] bool ends) {
#ifdef CUSIM_THREAD
    __tsan_switch_to_fiber(to.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef CUSIM_ADDRESS
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(ends ? nullptr : &fake_stack, to.bottom, to.bytes);
#endif
#if defined(__x86_64__)
    cusim_switch(&stack_pointer, to.stack_pointer);
#else
    swapcontext(&context, &to.context);
#endif
#ifdef CUSIM_ADDRESS
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }
  // The first words of a fiber's entry.
  static void entered([[maybe_unused]] Fiber& home) {
#ifdef CUSIM_ADDRESS
    const void* bottom = nullptr;
    size_t bytes = 0;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
    if (home.bytes == 0) home.bottom = bottom, home.bytes = bytes;
#endif
  }
  void become_home() {
    bytes = 0;
#ifdef CUSIM_THREAD
    sanitizer = __tsan_get_current_fiber();
#endif
  }
};

}  // namespace cusim
