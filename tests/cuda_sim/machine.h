// The emulator's state: threads, blocks, clusters, barriers. Only machine.cpp, memory.cpp and cluster.cpp see it.
#pragma once

#include <array>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cusim.h"
#include "fiber.h"

namespace cusim {

struct Block;
struct Cluster;

// What a thread does or waits for, and where.
struct Place {
  const char* what = "start";
  Location at;
};

struct Copy {
  void* to;
  const void* from;
  int bytes, source_bytes;
};

struct Thread {
  Fiber fiber;
  Thread* next = nullptr;  // of those that wait at the same barrier
  Block* block = nullptr;
  uint3 index{};
  unsigned lane = 0, warp = 0;
  Place place;
  bool done = false;
  unsigned cluster_arrivals = 0, cluster_waits = 0;
  std::vector<Copy> copies;    // cp.async not yet landed
  std::vector<size_t> groups;  // end of each committed group in `copies`
};

// Counts arrivals, generation after generation.
struct Barrier {
  unsigned expected = 0, arrived = 0, generation = 0;
  Thread* waiting = nullptr;
  Place first;         // of the generation's first arrival
  uint64_t tags[2]{};  // ThreadSanitizer's, of even and odd generations
};

// The lanes of a warp that meet under one mask.
struct Lanes {
  unsigned mask = 0;
  Barrier barrier;
  Packet packets[2][32];  // of even and odd generations
};

struct Warp {
  unsigned lanes = 0;
  std::deque<Lanes> groups;
};

struct Variable {
  const void* tag;  // null: the dynamic shared memory
  const char* name;
  unsigned char* base;
  size_t bytes;
  bool contains(const void* p, size_t n) const {
    const auto* q = static_cast<const unsigned char*>(p);
    return q >= base && q + n <= base + bytes;
  }
};

struct Block {
  uint3 index{};
  Cluster* cluster = nullptr;
  unsigned rank = 0;
  unsigned live = 0;
  Barrier barrier;
  std::array<Barrier, 16> named;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char, void (*)(void*)> memory{nullptr, std::free};
  size_t memory_bytes = 0, memory_used = 0;
  std::vector<Variable> variables;
  // Cluster barriers: the one that must follow the last remote access, and the last one that a thread waited for.
  unsigned accessed = 0, waited = 0;
};

struct AsyncStore {
  unsigned char* to;
  uint64_t* barrier;
  const unsigned char* from;  // null: `value`
  unsigned bytes;
  std::array<unsigned char, 16> value;
  Place place;
};

struct Cluster {
  std::vector<Block*> blocks;
  Barrier barrier;
  std::vector<AsyncStore> stores;  // not yet landed
};

struct Machine {
  std::mutex mutex;  // one launch at a time
  Shape shape;
  void (*run_thread)(const void*) = nullptr;
  const void* arguments = nullptr;
  Fiber home;
  Thread* current = nullptr;
  std::vector<Thread*> ready;  // a ring
  size_t first_ready = 0, ready_count = 0;
  size_t live = 0, idle = 0;  // threads not done; yields since something happened
  long long switches = 0;
  size_t launches = 0;
  uint64_t random = 0;  // 0: round robin
  bool run_ahead = false;
  std::vector<Stack> stacks;
  std::string error;
  uint64_t launch_tag = 0, exit_tag = 0;
};

extern Machine machine;

std::string describe(const Thread& thread);
[[noreturn]] void fail(const std::string& what, Location at);
uint64_t draw();  // the next random number

void arrive(Barrier& barrier, const Place& place, bool orders_memory);
void wait(Barrier& barrier, unsigned generation, const Place& place, bool orders_memory);
void arrive_and_wait(Barrier& barrier, const Place& place, bool orders_memory);
// A thread that has exited is not waited for.
void leave(Barrier& barrier);

void allocate_shared(Block& block, size_t dynamic_bytes);
// Fails if something was written around a variable.
void check_margins(const Block& block, const Place& place);
void copy(void* to, const void* from, size_t bytes);  // an access of the current fiber to ThreadSanitizer

void cluster_exit(Thread& thread);
void check_cluster_accesses(const Cluster& cluster);

}  // namespace cusim
