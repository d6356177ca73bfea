// The scheduler of the fibers: blocks, clusters, barriers, warp exchanges, and what goes wrong with them.
#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "fiber.h"
#include "launch_shape.h"

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {
namespace {

constexpr size_t kCanary = 64;
constexpr unsigned char kPoison = 0xff;  // NaN in every float format
constexpr unsigned char kCanaryByte = 0xa5;

struct Settings {
  uint64_t seed = 1;
  int capability = 90;
  int yield_one_in = 16;
  int largest_cluster = 8;
};

struct Warp {
  uint64_t values[32], results[32];
  unsigned from[32];
  unsigned mask = 0, arrived = 0;
  int line = 0;
};

struct Block {
  unsigned char* memory = nullptr;
  unsigned waiting = 0, left = 0;
  int line = 0;
  std::vector<Warp> warps;
};

struct Thread {
  Fiber fiber;
  int block = 0, index = 0;
  const char* waits_at = nullptr;  // null: runs
  int line = 0;
  unsigned phase = 0;
  bool done = false;
  bool last = false;  // runs only when all that is left are its like
};

struct Cluster {
  std::vector<Block> blocks;
  unsigned arrived = 0, phase = 0, threads = 0;
  int line = 0;
  size_t bytes = 0;
};

Settings settings;
std::map<const void*, int> shared_limits;
std::string error_text;
uint64_t random_state;
std::vector<std::unique_ptr<Thread>> threads;  // their stacks outlive a launch
std::vector<Thread*> ready, ready_last;
Cluster cluster;
Thread* current;
Fiber scheduler;
void (*kernel_call)(void*);
void* kernel_closure;
int device, launched_on = -1;
const void* launched_in;  // the stream
bool error_pending;

uint64_t random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state * 0x2545f4914f6cdd1dull >> 16;
}

void report(const std::string& text) {
  if (error_text.empty()) error_text = text;
}

std::string name(const Thread& t) {
  return "thread " + std::to_string(t.index) + " of the cluster's block " + std::to_string(t.block);
}

Block& block_of(const Thread& t) { return cluster.blocks[size_t(t.block)]; }

void enqueue(Thread& t) { (t.last ? ready_last : ready).push_back(&t); }

void to_scheduler(bool last = false) { current->fiber.switch_to(scheduler, last); }

void sleep(const char* where, int line) {
  current->waits_at = where;
  current->line = line;
  to_scheduler();
}

void wake(Thread& t) {
  if (!t.waits_at) return;
  t.waits_at = nullptr;
  enqueue(t);
}

// A launch that went wrong is given up: its fibers never run again.
void fail(const std::string& text) {
  report(text);
  to_scheduler(true);
}

void thread_main() {
  Fiber::arrived(current->fiber, &scheduler);
  kernel_call(kernel_closure);
  current->done = true;
  Block& block = block_of(*current);
  if (++block.left == blockDim.x) {
#ifdef __SANITIZE_ADDRESS__
    __asan_poison_memory_region(block.memory + kCanary, cluster.bytes);
#else
    memset(block.memory + kCanary, kPoison, cluster.bytes);
#endif
  }
  to_scheduler(true);
}

void allocate(Block& block, unsigned warps) {
  // under AddressSanitizer nothing behind the end, so that reading there is caught as well
#ifdef __SANITIZE_ADDRESS__
  const size_t bytes = kCanary + cluster.bytes;
#else
  const size_t bytes = 2 * kCanary + cluster.bytes;
#endif
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, bytes)) std::abort();
  block.memory = static_cast<unsigned char*>(memory);
  memset(block.memory, kCanaryByte, bytes);
  memset(block.memory + kCanary, kPoison, cluster.bytes);
  block.warps.assign(warps, Warp());
}

void release(Block& block) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(block.memory + kCanary, cluster.bytes);
  constexpr int sides = 1;
#else
  constexpr int sides = 2;
#endif
  for (int side = 0; side < sides; side++) {
    const unsigned char* canary = block.memory + (side ? kCanary + cluster.bytes : 0);
    for (size_t i = 0; i < kCanary; i++) {
      if (canary[i] != kCanaryByte) report("a write outside of the shared memory");
    }
  }
  free(block.memory);
  block.memory = nullptr;
}

void run_cluster(unsigned first_block, unsigned blocks, const cudaLaunchConfig_t& config) {
  const unsigned per_block = config.blockDim.x;
  cluster = Cluster();
  cluster.threads = blocks * per_block;
  cluster.bytes = config.dynamicSmemBytes;
  cluster.blocks.resize(blocks);
  for (Block& block : cluster.blocks) allocate(block, per_block / 32);
  while (threads.size() < cluster.threads) threads.push_back(std::make_unique<Thread>());
  ready.clear();
  ready_last.clear();
  for (unsigned i = 0; i < cluster.threads; i++) {
    Thread& t = *threads[i];
    t.fiber.prepare(thread_main);
    t.block = int(i / per_block);
    t.index = int(i % per_block);
    t.waits_at = nullptr;
    t.done = false;
    t.phase = 0;
    t.last = false;
  }
  // Left to chance alone all threads keep abreast. In most clusters one to three warps fall as far behind as barriers let them.
  for (uint64_t i = random_number() % 4; i > 0; i--) {
    const size_t first = random_number() % (cluster.threads / 32) * 32;
    for (size_t lane = 0; lane < 32; lane++) threads[first + lane]->last = true;
  }
  for (unsigned i = 0; i < cluster.threads; i++) enqueue(*threads[i]);
  while (!(ready.empty() && ready_last.empty()) && error_text.empty()) {
    std::vector<Thread*>& from = ready.empty() ? ready_last : ready;
    std::swap(from[random_number() % from.size()], from.back());
    current = from.back();
    from.pop_back();
    threadIdx = dim3(unsigned(current->index), 0, 0);
    blockIdx = dim3(first_block + unsigned(current->block), 0, 0);
    scheduler.switch_to(current->fiber);
  }
  const Thread *stuck = nullptr, *gone = nullptr;
  for (unsigned i = 0; i < cluster.threads; i++) (threads[i]->done ? gone : stuck) = threads[i].get();
  if (stuck) {
    report(name(*stuck) + " waits for ever at " + (stuck->waits_at ? stuck->waits_at : "nothing") + ", line " +
           std::to_string(stuck->line) + (gone ? "; " + name(*gone) + " has left" : "; so do all"));
  }
  for (Block& block : cluster.blocks) release(block);
}

}  // namespace

void maybe_yield() {
  if (random_number() % unsigned(settings.yield_one_in)) return;
  enqueue(*current);
  to_scheduler();
}

void check_alignment(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail(name(*current) + ": misaligned access of " + std::to_string(bytes) + " bytes");
}

void block_barrier(int line) {
  Block& block = block_of(*current);
  if (block.waiting == 0) block.line = line;
  if (block.line != line) {
    fail(name(*current) + " is at __syncthreads of line " + std::to_string(line) + ", others at that of line " +
         std::to_string(block.line));
  }
  const unsigned all = blockDim.x;
  if (++block.waiting < all) return sleep("__syncthreads", line);
  block.waiting = 0;
  for (unsigned i = 0; i < all; i++) wake(*threads[size_t(current->block) * all + i]);
  maybe_yield();
}

void cluster_arrive(int line) {
  if (cluster.arrived == 0) cluster.line = line;
  if (cluster.line != line) fail(name(*current) + " is at another cluster barrier than others, line " + std::to_string(line));
  current->phase = cluster.phase;
  if (++cluster.arrived < cluster.threads) return;
  cluster.arrived = 0;
  cluster.phase++;
  for (unsigned i = 0; i < cluster.threads; i++) {
    if (threads[i]->waits_at && std::string(threads[i]->waits_at) == "the cluster barrier") wake(*threads[i]);
  }
}

void cluster_wait(int line) {
  if (current->phase == cluster.phase) sleep("the cluster barrier", line);
}

unsigned cluster_rank() { return unsigned(current->block); }
unsigned cluster_blocks() { return unsigned(cluster.blocks.size()); }

void* map_shared(void* own, int rank) {
  const ptrdiff_t offset = static_cast<unsigned char*>(own) - (block_of(*current).memory + kCanary);
  if (offset < 0 || size_t(offset) >= cluster.bytes || rank < 0 || size_t(rank) >= cluster.blocks.size()) {
    fail("map_shared_rank of rank " + std::to_string(rank) + " at offset " + std::to_string(offset));
  }
  maybe_yield();
  return cluster.blocks[size_t(rank)].memory + kCanary + offset;
}

uint64_t exchange(unsigned mask, uint64_t value, unsigned from, int line) {
  const unsigned lane = unsigned(current->index) % 32, bit = 1u << lane;
  Warp& warp = block_of(*current).warps[size_t(current->index) / 32];
  if (!(mask & bit)) fail(name(*current) + " is not in the mask of its shuffle, line " + std::to_string(line));
  if (warp.arrived == 0) {
    warp.mask = mask;
    warp.line = line;
  }
  if (warp.mask != mask || warp.line != line) {
    fail(name(*current) + " is at a shuffle of line " + std::to_string(line) + ", others of its warp at that of line " +
         std::to_string(warp.line));
  }
  warp.values[lane] = value;
  warp.from[lane] = from;
  warp.arrived |= bit;
  if (warp.arrived != mask) {
    sleep("a shuffle", line);
    return warp.results[lane];
  }
  // The last one hands out all results, so that nobody's next value can get in between.
  warp.arrived = 0;
  for (unsigned i = 0; i < 32; i++) {
    if (!(mask >> i & 1)) continue;
    warp.results[i] = mask >> warp.from[i] & 1 ? warp.values[warp.from[i]] : ~uint64_t(0);
    if (i != lane) wake(*threads[size_t(current->block) * blockDim.x + size_t(current->index) / 32 * 32 + i]);
  }
  const uint64_t result = warp.results[lane];
  maybe_yield();
  return result;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*call)(void*), void* closure) {
  error_text.clear();
  launched_on = device;
  launched_in = config.stream;
  unsigned blocks = 1;
  if (config.numAttrs) blocks = config.attrs[0].val.clusterDim.x;
  const auto limit = shared_limits.find(kernel);
  const size_t allowed = limit == shared_limits.end() ? 48 << 10 : size_t(limit->second);
  if (config.dynamicSmemBytes > allowed) report("more shared memory than the kernel was allowed");
  if (config.blockDim.x == 0 || config.blockDim.x % 32 || config.blockDim.x > 1024) report("threads of a block");
  if (config.numAttrs && int(blocks) > settings.largest_cluster) {
    report("no room for a cluster of this size");
    error_pending = true;
    return cudaErrorInvalidClusterSize;
  }
  if (config.gridDim.x == 0 || config.gridDim.x % blocks) report("grid and cluster do not fit");
  if (config.numAttrs && settings.capability < 90) report("clusters need compute capability 9.0");
  if (!error_text.empty()) return cudaErrorInvalidValue;
  blockDim = config.blockDim;
  gridDim = config.gridDim;
  kernel_call = call;
  kernel_closure = closure;
  random_state = settings.seed * 0x9e3779b97f4a7c15ull + 1;
  const unsigned clusters = config.gridDim.x / blocks;
  std::vector<unsigned> order(clusters);
  for (unsigned i = 0; i < clusters; i++) order[i] = i;
  for (unsigned i = clusters; i > 1; i--) std::swap(order[i - 1], order[random_number() % i]);
  for (unsigned i = 0; i < clusters && error_text.empty(); i++) run_cluster(order[i] * blocks, blocks, config);
  return error_text.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace shim

namespace grpo_kernels {
unsigned char* shared_memory() { return shim::block_of(*shim::current).memory + shim::kCanary; }
}  // namespace grpo_kernels

cudaError_t cudaGetDevice(int* device) {
  *device = shim::device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device > 1) return cudaErrorInvalidDevice;
  shim::device = device;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  shim::error_pending = false;
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void* kernel) { return kernel ? cudaSuccess : cudaErrorInvalidValue; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidDevice ? "invalid device ordinal" : shim::error_text.c_str();
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? shim::settings.capability / 10 : shim::settings.capability % 10;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  shim::shared_limits[kernel] = value;
  return cudaSuccess;
}

extern "C" {
int shim_device() { return shim::device; }
int shim_launched_on() { return shim::launched_on; }
const void* shim_launched_in() { return shim::launched_in; }
bool shim_error_pending() { return shim::error_pending; }

int cluster_size(int64_t columns, int size, int capability) { return grpo_kernels::cluster_size(columns, size, capability); }
int64_t block_memory(int64_t columns, int size, int cluster) { return grpo_kernels::block_memory(columns, size, cluster); }
int threads_of(int64_t columns, int size, int visits, int cluster) {
  return grpo_kernels::threads_of(columns, size, visits, cluster);
}
int threads_of_two_tiles(int64_t columns, int size) { return grpo_kernels::threads_of_two_tiles(columns, size); }
int most_shared_memory(int capability) { return grpo_kernels::most_shared_memory(capability); }

void shim_set(uint64_t seed, int capability, int yield_one_in, int largest_cluster) {
  shim::settings = {seed, capability, yield_one_in, largest_cluster};
}
}
