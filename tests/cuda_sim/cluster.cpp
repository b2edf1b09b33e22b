// Clusters: their barrier, the shared memory of other blocks, mbarriers and the copies that complete on them.
//
// Reported whatever the schedule: a rank or an address outside the cluster; an access to another block's shared memory
// before the first cluster barrier (the block may not have begun) or with no cluster barrier between the access and its
// exit; arrivals and waits that do not alternate; an asynchronous store or load that nobody waits for; an mbarrier that
// is used before it is initialised or gets more arrivals than it counts.
#include <cstring>

#include "machine.h"

namespace cusim {

namespace {

// An mbarrier's 8 bytes.
struct State {
  int32_t bytes;  // expected less landed
  uint32_t pending : 15, count : 15, phase : 1, initialised : 1;
};
static_assert(sizeof(State) == sizeof(uint64_t));
constexpr uint64_t kUnset = ~0ull;  // as shared memory begins

struct Owner {
  Block* block;
  const Variable* variable;
};

// The block of the cluster that has [p, p + bytes) in its shared memory, if any.
Owner owner(const void* p, size_t bytes) {
  for (Block* block : machine.current->block->cluster->blocks) {
    for (const Variable& variable : block->variables) {
      if (variable.contains(p, bytes)) return {block, &variable};
    }
  }
  return {nullptr, nullptr};
}

// Checks an access through a mapped address. Returns the block that owns it.
Block* check_remote(const void* p, size_t bytes, const char* what, Location at) {
  const Thread& thread = *machine.current;
  Block* block = owner(p, bytes).block;
  const std::string name = what;
  if (block == nullptr) fail(name + ": the address is outside the shared memory of the cluster", at);
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) fail(name + ": misaligned", at);
  if (block == thread.block) return block;
  if (thread.cluster_waits == 0) fail(name + ": shared memory of another block before the first cluster barrier", at);
  if (block->live == 0) fail(name + ": shared memory of a block that has exited", at);
  return block;
}

// ThreadSanitizer sees every use of an mbarrier as a read, and only its initialisation as a write.
State load(uint64_t* barrier, const char* what, Location at) {
  const std::string name = what;
  if (reinterpret_cast<uintptr_t>(barrier) % sizeof(uint64_t) != 0) fail(name + ": misaligned mbarrier", at);
  note_read(barrier, sizeof *barrier);
  uint64_t word;
  __builtin_memcpy(&word, barrier, sizeof word);
  State state;
  __builtin_memcpy(&state, &word, sizeof state);
  if (word == kUnset || !state.initialised) fail(name + ": the mbarrier is not initialised", at);
  return state;
}

void store(uint64_t* barrier, State state) {
  if (state.pending == 0 && state.bytes == 0) {
    state.phase ^= 1;
    state.pending = state.count;
    progress();
  }
  __builtin_memcpy(barrier, &state, sizeof state);
}

void complete(uint64_t* barrier, unsigned bytes, const Place& place) {
  State state = load(barrier, place.what, place.at);
  state.bytes -= static_cast<int>(bytes);
  store(barrier, state);
}

void count_arrival(uint64_t* barrier, unsigned bytes, const char* what, Location at) {
  State state = load(barrier, what, at);
  if (state.pending == 0) fail(std::string(what) + ": more arrivals than the mbarrier counts", at);
  note_release(barrier);
  state.bytes += static_cast<int>(bytes);
  --state.pending;
  store(barrier, state);
}

void land(const AsyncStore& s) {
  copy(s.to, s.from == nullptr ? s.value.data() : s.from, s.bytes);
  complete(s.barrier, s.bytes, s.place);
}

// Lands when someone tests the mbarrier: with a seed now or then. For ThreadSanitizer now, as the issuing thread's write.
void issue(const AsyncStore& s) {
  if (kThreadSanitizer || (machine.random != 0 && draw() % 2 == 0)) {
    land(s);
    note_release(s.barrier);
  } else {
    machine.current->block->cluster->stores.push_back(s);
  }
}

}  // namespace

void st_async(uintptr_t to, const void* value, size_t bytes, uintptr_t barrier, Location at) {
  const Place place{"st_async", at};
  auto* target = reinterpret_cast<unsigned char*>(to);
  auto* counter = reinterpret_cast<uint64_t*>(barrier);
  if (check_remote(target, bytes, place.what, at) != check_remote(counter, sizeof *counter, place.what, at)) {
    fail("st_async: data and mbarrier lie in different blocks", at);
  }
  AsyncStore s{target, counter, nullptr, static_cast<unsigned>(bytes), {}, place};
  __builtin_memcpy(s.value.data(), value, bytes);
  issue(s);
}

void* remote(uintptr_t address, size_t bytes, const char* what, Location at) {
  void* p = reinterpret_cast<void*>(address);
  Block* block = check_remote(p, bytes, what, at);
  const unsigned next_barrier = machine.current->cluster_arrivals + 1;
  if (block != machine.current->block && block->accessed < next_barrier) block->accessed = next_barrier;
  return p;
}

void cluster_exit(Thread& thread) {
  Block& block = *thread.block;
  if (thread.cluster_arrivals != thread.cluster_waits) {
    fail("exits between cluster_arrive and cluster_wait", thread.place.at);
  }
  leave(block.cluster->barrier);
  if (thread.cluster_waits > block.waited) block.waited = thread.cluster_waits;
  if (block.live > 0) return;
  for (const AsyncStore& s : block.cluster->stores) {
    if (owner(s.to, s.bytes).block == &block) {
      fail(std::string(s.place.what) + ": nobody waited for it, and its block exits", s.place.at);
    }
  }
}

void check_cluster_accesses(const Cluster& cluster) {
  for (const Block* block : cluster.blocks) {
    if (block->accessed <= block->waited) continue;
    machine.error = "block " + std::to_string(block->index.x) +
                    " may exit before another block's last access to its shared memory: no cluster barrier between";
  }
}

}  // namespace cusim

namespace gpu {

using cusim::fail;
using cusim::machine;
using cusim::Place;

unsigned cluster_rank() { return machine.current->block->rank; }
unsigned cluster_size() { return machine.shape.cluster_size; }

namespace {

void arrive_at_cluster(bool releases, const Place& place) {
  cusim::Thread& thread = *machine.current;
  if (thread.cluster_arrivals != thread.cluster_waits) {
    fail("cluster_arrive: the thread has not waited for the barrier before", place.at);
  }
  ++thread.cluster_arrivals;
  cusim::arrive(thread.block->cluster->barrier, place, releases);
}

}  // namespace

void cluster_arrive(Location at) { arrive_at_cluster(true, {"cluster_arrive", at}); }
void cluster_arrive_relaxed(Location at) { arrive_at_cluster(false, {"cluster_arrive_relaxed", at}); }

void cluster_wait(Location at) {
  cusim::Thread& thread = *machine.current;
  if (thread.cluster_arrivals == thread.cluster_waits) fail("cluster_wait without cluster_arrive", at);
  cusim::wait(thread.block->cluster->barrier, thread.cluster_waits, {"cluster_wait", at}, true);
  ++thread.cluster_waits;
}

ClusterAddress cluster_map(const void* own, unsigned rank, Location at) {
  const cusim::Block& block = *machine.current->block;
  const auto [owner, variable] = cusim::owner(own, 1);
  if (owner != &block) fail("cluster_map: not an address of the block's own shared memory", at);
  if (rank >= block.cluster->blocks.size()) fail("cluster_map: the rank is outside the cluster", at);
  const ptrdiff_t offset = static_cast<const unsigned char*>(own) - variable->base;
  for (const cusim::Variable& other : block.cluster->blocks[rank]->variables) {
    if (other.tag == variable->tag) return {reinterpret_cast<uintptr_t>(other.base + offset)};
  }
  fail("cluster_map: the other block has not come to this shared variable yet", at);
}

void mbarrier_init(uint64_t* barrier, unsigned arrivals, Location at) {
  cusim::check_shared(barrier, sizeof *barrier, sizeof *barrier, "mbarrier_init", at);
  if (arrivals == 0 || arrivals > 0x7FFF) fail("mbarrier_init: the count is not 1 to 32767", at);
  cusim::note_write(barrier, sizeof *barrier);
  cusim::store(barrier, {0, arrivals, arrivals, 0, 1});
}

void mbarrier_arrive(uint64_t* barrier, Location at) {
  cusim::check_shared(barrier, sizeof *barrier, sizeof *barrier, "mbarrier_arrive", at);
  cusim::count_arrival(barrier, 0, "mbarrier_arrive", at);
}

void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes, Location at) {
  cusim::check_shared(barrier, sizeof *barrier, sizeof *barrier, "mbarrier_arrive_expect", at);
  cusim::count_arrival(barrier, bytes, "mbarrier_arrive_expect", at);
}

void mbarrier_arrive_remote(ClusterAddress barrier, Location at) {
  void* p = cusim::remote(barrier.value, sizeof(uint64_t), "mbarrier_arrive_remote", at);
  cusim::count_arrival(static_cast<uint64_t*>(p), 0, "mbarrier_arrive_remote", at);
}

bool mbarrier_try_wait(uint64_t* barrier, unsigned parity, Location at) {
  cusim::check_shared(barrier, sizeof *barrier, sizeof *barrier, "mbarrier_try_wait", at);
  auto& stores = machine.current->block->cluster->stores;
  std::erase_if(stores, [&](const cusim::AsyncStore& s) {
    if (s.barrier != barrier) return false;
    cusim::land(s);
    return true;
  });
  if (cusim::load(barrier, "mbarrier_try_wait", at).phase == (parity & 1)) return false;
  cusim::note_acquire(barrier);
  return true;
}

void bulk_load(void* shared, const void* global, unsigned bytes, uint64_t* barrier, Location at) {
  cusim::check_shared(shared, bytes, 16, "bulk_load", at);
  cusim::check_shared(barrier, sizeof *barrier, sizeof *barrier, "bulk_load", at);
  if (reinterpret_cast<uintptr_t>(global) % 16 != 0 || bytes % 16 != 0) fail("bulk_load: not in multiples of 16", at);
  cusim::issue({static_cast<unsigned char*>(shared),
                barrier,
                static_cast<const unsigned char*>(global),
                bytes,
                {},
                {"bulk_load", at}});
}

}  // namespace gpu
