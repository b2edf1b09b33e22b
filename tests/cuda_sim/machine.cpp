// The scheduler: launches, fibers that take turns, barriers, and what can be said when nobody can go on.
#include "machine.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <map>

#if defined(__x86_64__)
asm(R"(
.text
.weak cusim_switch
.hidden cusim_switch
.type cusim_switch, @function
cusim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cusim_switch, . - cusim_switch
)");
#endif

namespace cusim {

Machine machine;

namespace {

// --- Words ------------------------------------------------------------------------------------------------------------

std::string text(const uint3& index) {
  return std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z);
}

std::string text(Location at) {
  if (at.line() == 0) return "the start";
  const std::string file = at.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(at.line());
}

// Known only if the program exports it (-rdynamic), and not of kernels in anonymous namespaces.
std::string name_of(const void* kernel) {
  Dl_info info;
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr || info.dli_saddr != kernel) return "kernel";
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> name(abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status),
                                                    std::free);
  return std::string("kernel ") + (status == 0 ? name.get() : info.dli_sname);
}

// Who waits where, for up to eight places.
std::string who_waits(const std::vector<Thread>& threads) {
  std::map<std::string, std::pair<size_t, const Thread*>> places;  // how many threads, and the first
  for (const Thread& thread : threads) {
    if (thread.done) continue;
    const std::string place = std::string(thread.place.what) + " (" + text(thread.place.at) + ")";
    auto& found = places.try_emplace("block " + text(thread.block->index) + " at " + place, 0, &thread).first->second;
    ++found.first;
  }
  std::string said;
  int shown = 0;
  for (const auto& [place, found] : places) {
    if (shown++ == 8) return said + " ...";
    said += "\n  " + place + ": " + std::to_string(found.first) + " threads, the first is " + text(found.second->index);
  }
  return said;
}

// Whether some threads of a block wait at a block's barrier and others of it elsewhere.
bool diverged(const std::vector<Thread>& threads) {
  return std::any_of(threads.begin(), threads.end(), [&](const Thread& thread) {
    const Barrier& barrier = thread.block->barrier;
    return !thread.done && barrier.arrived > 0 && barrier.arrived < barrier.expected;
  });
}

// --- Turns ------------------------------------------------------------------------------------------------------------

void push(Thread* thread) {
  machine.ready[(machine.first_ready + machine.ready_count++) % machine.ready.size()] = thread;
}

Thread* pop() {
  const size_t size = machine.ready.size();
  if (machine.random != 0) {
    constexpr uint64_t kAhead = 63;  // of 64 turns go to the thread that was made ready last
    if (machine.run_ahead && draw() % 64 < kAhead) {
      return machine.ready[(machine.first_ready + --machine.ready_count) % size];
    }
    const size_t chosen = (machine.first_ready + draw() % machine.ready_count) % size;
    std::swap(machine.ready[machine.first_ready], machine.ready[chosen]);
  }
  Thread* thread = machine.ready[machine.first_ready];
  machine.first_ready = (machine.first_ready + 1) % size;
  --machine.ready_count;
  return thread;
}

// Leaves the current thread, which waits for something, for one that is ready: without any, for launch().
void next_turn() {
  Thread* from = machine.current;
  ++machine.switches;
  if (machine.ready_count == 0) {
    from->fiber.switch_to(machine.home, from->done);
    return;
  }
  Thread* to = pop();
  if (to == from) return;
  machine.current = to;
  from->fiber.switch_to(to->fiber, from->done);
}

void release(Barrier& barrier) {
  barrier.arrived = 0;
  ++barrier.generation;
  progress();
  while (Thread* thread = barrier.waiting) {
    barrier.waiting = thread->next;
    push(thread);
  }
}

void thread_main() {
  Fiber::entered(machine.home);
  Thread& thread = *machine.current;
  note_acquire(&machine.launch_tag);
  thread.place.what = "code";
  machine.run_thread(machine.arguments);
  thread.place.what = "exit";
  if (!thread.copies.empty()) fail("exits with copies of cp_async that it never waited for", thread.place.at);
  if (--thread.block->live == 0) check_margins(*thread.block, thread.place);
  cluster_exit(thread);
  thread.done = true;
  --machine.live;
  progress();
  leave(thread.block->barrier);
  note_release(&machine.exit_tag);
  next_turn();
  std::abort();  // a thread that is done gets no turn
}

// --- Launches ---------------------------------------------------------------------------------------------------------

struct Run {
  std::vector<Cluster> clusters;
  std::vector<Block> blocks;
  std::vector<Thread> threads;
};

// Runs the blocks at `indices`, all at the same time: whole clusters, in rank order.
void run_blocks(Run& run, const uint3* indices, size_t count, size_t first_stack) {
  const dim3& size = machine.shape.block;
  const unsigned per_block = size.x * size.y * size.z, cluster_size = machine.shape.cluster_size;
  auto& [clusters, blocks, threads] = run;
  clusters.resize(count / cluster_size);
  blocks.resize(count);
  threads.resize(count * per_block);
  machine.ready.assign(threads.size(), nullptr);
  machine.first_ready = machine.ready_count = machine.idle = 0;
  machine.live = threads.size();
  while (machine.stacks.size() < first_stack + threads.size()) machine.stacks.emplace_back();

  for (size_t k = 0; k < count; ++k) {
    Block& block = blocks[k];
    block.index = indices[k];
    block.cluster = &clusters[k / cluster_size];
    block.rank = static_cast<unsigned>(k % cluster_size);
    block.live = block.barrier.expected = per_block;
    block.cluster->blocks.push_back(&block);
    block.cluster->barrier.expected += per_block;
    block.warps.resize((per_block + 31) / 32);
    allocate_shared(block, machine.shape.shared_bytes);
    for (unsigned i = 0; i < per_block; ++i) {
      Thread& thread = threads[k * per_block + i];
      thread.block = &block;
      thread.lane = i % 32;
      thread.warp = i / 32;
      thread.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
      block.warps[thread.warp].lanes |= 1u << thread.lane;
      Stack& stack = machine.stacks[first_stack + k * per_block + i];
      stack.reset();
      thread.fiber.start(stack, thread_main, describe(thread).c_str());
      push(&thread);
    }
  }

  machine.home.become_home();
  machine.current = pop();
  machine.home.switch_to(machine.current->fiber, false);
  for (Thread& thread : threads) thread.fiber.destroy(machine.home, !thread.done);

  for (size_t i = 0; i < threads.size() && machine.error.empty(); ++i) {
    if (machine.stacks[first_stack + i].overflown()) machine.error = "stack overflow in " + describe(threads[i]);
  }
  if (machine.error.empty() && machine.live > 0) {
    const char* what = diverged(threads) ? "divergence at a barrier: " : "deadlock: ";
    machine.error = what + std::to_string(machine.live) + " threads wait for ever" + who_waits(threads);
  } else if (machine.error.starts_with("waits too long")) {
    machine.error += who_waits(threads);
  }
  for (const Cluster& cluster : clusters) {
    if (machine.error.empty()) check_cluster_accesses(cluster);
  }
}

void seed() {
  const char* variable = std::getenv("CUSIM_SEED");
  const unsigned long number = variable == nullptr ? 0 : std::strtoul(variable, nullptr, 10);
  machine.random = number * 0x9E3779B97F4A7C15ull;
  machine.run_ahead = number % 2 == 1;
}

const char* invalid(const Shape& shape) {
  constexpr unsigned kMaxThreads = 1024;
  const unsigned threads = shape.block.x * shape.block.y * shape.block.z;
  const unsigned blocks = shape.grid.x * shape.grid.y * shape.grid.z;
  if (threads == 0 || threads > kMaxThreads) return "launched with no threads, or more than 1024 a block";
  if (blocks == 0) return "launched with no blocks";
  if (max_blocks(shape.block, shape.shared_bytes) == 0) return "launched with more shared memory than a block can have";
  if (shape.cluster_size == 0 || shape.cluster_size > max_cluster() || shape.grid.x % shape.cluster_size != 0) {
    return "launched with clusters of more than 16 blocks, or that do not divide the grid";
  }
  if (shape.cooperative && blocks > static_cast<unsigned>(max_blocks(shape.block, shape.shared_bytes))) {
    return "launched cooperatively with more blocks than run at the same time";
  }
  return nullptr;
}

}  // namespace

std::string describe(const Thread& thread) {
  return "block " + text(thread.block->index) + " thread " + text(thread.index);
}

uint64_t draw() {  // xorshift
  machine.random ^= machine.random << 13;
  machine.random ^= machine.random >> 7;
  machine.random ^= machine.random << 17;
  return machine.random >> 16;
}

void fail(const std::string& what, Location at) {
  machine.error = what + " (" + describe(*machine.current) + " at " + text(at) + ")";
  machine.current->fiber.switch_to(machine.home, true);
  std::abort();  // the launch is over
}

void fail(const char* what, Location at) { fail(std::string(what), at); }

void progress() { machine.idle = 0; }

void yield(const char* what, Location at) {
  const size_t limit = 100'000 + 1'000 * machine.live;
  machine.current->place = {what, at};
  if (++machine.idle > limit) fail(std::string("waits too long: ") + what + " is never satisfied", at);
  push(machine.current);
  next_turn();
}

void launch(const void* kernel, const Shape& shape, void (*run_thread)(const void*), const void* arguments) {
  const std::lock_guard<std::mutex> lock(machine.mutex);
  if (const char* what = invalid(shape)) throw std::runtime_error("cusim: " + name_of(kernel) + ": " + what);
  machine.shape = shape;
  ++machine.launches;
  machine.run_thread = run_thread;
  machine.arguments = arguments;
  machine.error.clear();
  seed();

  const unsigned size = shape.cluster_size;
  std::vector<uint3> indices;
  for (unsigned z = 0; z < shape.grid.z; ++z) {
    for (unsigned y = 0; y < shape.grid.y; ++y) {
      for (unsigned x = 0; x < shape.grid.x; ++x) indices.push_back({x, y, z});
    }
  }
  // What nobody promised: that one cluster runs before the other.
  for (size_t k = indices.size() / size; machine.random != 0 && k > 1; --k) {
    const size_t other = draw() % k;
    if (other + 1 == k) continue;
    std::swap_ranges(&indices[other * size], &indices[other * size] + size, &indices[(k - 1) * size]);
  }

  // Only launch and exit order memory: to ThreadSanitizer blocks that ran one after the other ran at the same time. It
  // must not see two of them use the same memory, of stacks or of shared variables.
  const size_t at_once = shape.cooperative ? indices.size() : size;
  std::deque<Run> runs;
  note_release(&machine.launch_tag);
  for (size_t k = 0; k < indices.size() && machine.error.empty(); k += at_once) {
    if (!kThreadSanitizer) runs.clear();
    const size_t first_stack = runs.size() * at_once * shape.block.x * shape.block.y * shape.block.z;
    run_blocks(runs.emplace_back(), &indices[k], at_once, first_stack);
  }
  note_acquire(&machine.exit_tag);
  if (!machine.error.empty()) throw std::runtime_error("cusim: " + name_of(kernel) + ": " + machine.error);
}

size_t launches() { return machine.launches; }

unsigned max_cluster() {
  const char* variable = std::getenv("CUSIM_MAX_CLUSTER");
  return variable == nullptr ? 16 : static_cast<unsigned>(std::strtoul(variable, nullptr, 10));
}

int max_blocks(dim3 block, size_t shared_bytes) {
  constexpr size_t kMultiprocessors = 132, kSharedBytes = 228 << 10, kReservedBytes = 1 << 10, kThreads = 2048,
                   kBlocks = 32;
  const size_t threads = (block.x * block.y * block.z + 31) / 32 * 32;
  return static_cast<int>(kMultiprocessors *
                          std::min({kBlocks, kThreads / threads, kSharedBytes / (shared_bytes + kReservedBytes)}));
}

const uint3& thread_index() { return machine.current->index; }
const uint3& block_index() { return machine.current->block->index; }
const dim3& block_size() { return machine.shape.block; }
const dim3& grid_size() { return machine.shape.grid; }
unsigned lane() { return machine.current->lane; }

// --- Barriers ---------------------------------------------------------------------------------------------------------

void arrive(Barrier& barrier, const Place& place, bool orders_memory) {
  if (barrier.arrived == 0) barrier.first = place;
  if (orders_memory) note_release(&barrier.tags[barrier.generation & 1]);
  if (++barrier.arrived >= barrier.expected) release(barrier);
}

void wait(Barrier& barrier, unsigned generation, const Place& place, bool orders_memory) {
  if (barrier.generation == generation) {
    Thread* thread = machine.current;
    thread->next = barrier.waiting;
    barrier.waiting = thread;
    thread->place = place;
    next_turn();
    thread->place.what = "code";
  }
  if (orders_memory) note_acquire(&barrier.tags[generation & 1]);
}

void arrive_and_wait(Barrier& barrier, const Place& place, bool orders_memory) {
  const unsigned generation = barrier.generation;
  arrive(barrier, place, orders_memory);
  wait(barrier, generation, place, orders_memory);
}

void leave(Barrier& barrier) {
  if (--barrier.expected > 0 && barrier.arrived >= barrier.expected) release(barrier);
}

namespace {

// Where all must call the same function in the same line.
void check_same(const Barrier& barrier, const Place& place) {
  if (barrier.arrived == 0) return;
  if (barrier.first.what == place.what && barrier.first.at.line() == place.at.line()) return;
  fail(std::string("divergence at a barrier: ") + place.what + ", where others are at " + barrier.first.what + " (" +
           text(barrier.first.at) + ")",
       place.at);
}

Lanes& lanes_of(Thread& thread, unsigned mask, const Place& place) {
  Warp& warp = thread.block->warps[thread.warp];
  mask &= warp.lanes;
  if ((mask >> thread.lane & 1) == 0) fail(std::string(place.what) + ": the calling lane is not in its mask", place.at);
  for (Lanes& lanes : warp.groups) {
    if (lanes.mask == mask) return lanes;
  }
  Lanes& lanes = warp.groups.emplace_back();
  lanes.mask = mask;
  lanes.barrier.expected = static_cast<unsigned>(__builtin_popcount(mask));
  return lanes;
}

}  // namespace

Packets exchange(unsigned mask, const Packet& mine, const char* what, Location at) {
  Thread& thread = *machine.current;
  const Place place{what, at};
  Lanes& lanes = lanes_of(thread, mask, place);
  check_same(lanes.barrier, place);
  // The generation after the next one, which reuses the packets, begins only when all have read them.
  Packet* packets = lanes.packets[lanes.barrier.generation & 1];
  packets[thread.lane] = mine;
  arrive_and_wait(lanes.barrier, place, false);
  return Packets(packets);
}

Packet Packets::operator[](unsigned lane) const { return packets_[lane]; }

unsigned present(unsigned mask) {
  const Thread& thread = *machine.current;
  return mask & thread.block->warps[thread.warp].lanes;
}

void check_lane(unsigned mask, unsigned from, const char* what, Location at) {
  if ((present(mask) >> from & 1) == 0) fail(std::string(what) + ": reads a lane outside the mask", at);
}

}  // namespace cusim

namespace gpu {

using cusim::machine;
using cusim::Place;

void syncthreads(Location at) {
  cusim::Block& block = *machine.current->block;
  const Place place{"syncthreads", at};
  cusim::check_same(block.barrier, place);
  if (block.barrier.arrived + 1 == block.barrier.expected) cusim::check_margins(block, place);
  cusim::arrive_and_wait(block.barrier, place, true);
}

namespace {

cusim::Barrier& named_barrier(unsigned id, unsigned threads, const Place& place) {
  if (id == 0 || id > 15) cusim::fail("named barrier: the id is not 1 to 15", place.at);
  if (threads == 0 || threads % 32 != 0) cusim::fail("named barrier: not whole warps", place.at);
  cusim::Barrier& barrier = machine.current->block->named[id];
  if (barrier.arrived > 0 && barrier.expected != threads) {
    cusim::fail("named barrier: others gave another number of threads", place.at);
  }
  barrier.expected = threads;
  return barrier;
}

}  // namespace

void named_barrier_sync(unsigned id, unsigned threads, Location at) {
  const Place place{"named_barrier_sync", at};
  cusim::arrive_and_wait(named_barrier(id, threads, place), place, true);
}

void named_barrier_arrive(unsigned id, unsigned threads, Location at) {
  const Place place{"named_barrier_arrive", at};
  cusim::arrive(named_barrier(id, threads, place), place, true);
}

void syncwarp(unsigned mask, Location at) {
  const Place place{"syncwarp", at};
  cusim::Barrier& barrier = cusim::lanes_of(*machine.current, mask, place).barrier;
  cusim::check_same(barrier, place);
  cusim::arrive_and_wait(barrier, place, true);
}

void require_cooperative(Location at) {
  if (!machine.shape.cooperative) cusim::fail("a grid barrier in a launch that is not cooperative", at);
}

long long clock_cycles() { return ++machine.switches; }

}  // namespace gpu
