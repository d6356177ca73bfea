// The shape of a launch of the CUDA row kernels, and how a row is dealt out: pure functions of tile and device, no CUDA in here.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define GRPO_SHAPE __host__ __device__ __forceinline__
#else
#define GRPO_SHAPE inline
#endif

namespace grpo_kernels {
namespace {

constexpr int kUnitBytes = 16;
constexpr int kPieceColumns = 1024;  // a warp folds so many; a whole fixed tile for each would leave a third of the warps idle
constexpr int kPiecesOfTile = 4;
constexpr int kMostPieces = 256;        // of a block, whose statistics are in its shared memory at once
constexpr int kThreadsOfRange = 32;     // half of the ranges have two columns
constexpr int kLargestCluster = 8;      // more need a permission of their own, and not every GPU has them
constexpr int kPerMultiprocessor = 2;   // blocks that a row's pieces leave room for: one computes while another loads
constexpr int kScratchBytes = (kMostPieces + 1) * 4 * 8;  // statistics of pieces, and of the row
constexpr int kScratchBytesOfSquares = (kMostPieces + 1) * 5 * 8;
constexpr int kThreadsOfClose = 128;    // a warp for each row
constexpr int kMostThreadsKept = 448;   // of a block that keeps its part of a row: 72 registers for each where there are two blocks

// Pieces of a row that each block of a cluster has; the last ones may have fewer.
GRPO_SHAPE int64_t pieces_of_block(int64_t columns, int cluster) {
  const int64_t pieces = (columns + kPieceColumns - 1) / kPieceColumns;
  return (pieces + cluster - 1) / cluster;
}

inline int64_t units_of(int64_t columns, int element_size) { return (columns * element_size + kUnitBytes - 1) / kUnitBytes; }

// Most bytes of shared memory that one block may have, by compute capability (90 is 9.0).
// Source: CUDA C++ Programming Guide, technical specifications per compute capability.
inline int most_shared_memory(int capability) {
  switch (capability) {
    case 80:
    case 87:
      return 163 << 10;
    case 86:
    case 89:
    case 120:
    case 121:
      return 99 << 10;
    case 90:
    case 100:
    case 101:
    case 103:
    case 110:
      return 227 << 10;
    default:
      return 48 << 10;  // every device has these
  }
}

// Bytes of shared memory of a block, `cluster` of which keep a row (the first has most of it); 0: none does.
inline int64_t block_memory(int64_t columns, int element_size, int cluster) {
  if (cluster == 0) return kScratchBytes;
  const int64_t units = units_of(columns, element_size);
  const int64_t most = pieces_of_block(columns, cluster) * kPieceColumns * element_size / kUnitBytes;
  return kScratchBytes + kUnitBytes * (units < most ? units : most);
}

// Blocks of a cluster that keep a row in shared memory: 1, 2, 4 or 8; 0 where it does not fit or there are no clusters.
inline int cluster_size(int64_t columns, int element_size, int capability) {
  if (capability < 90) return 0;
  const int limit = most_shared_memory(capability);
  int fits = 0;
  for (int blocks = kLargestCluster; blocks >= 1; blocks /= 2) {
    const int64_t bytes = block_memory(columns, element_size, blocks);
    if (bytes > limit) break;
    if (fits == 0 || bytes <= limit / kPerMultiprocessor) fits = blocks;
  }
  return fits;
}

inline int most_threads(int element_size) { return element_size == 8 ? 512 : 1024; }

// Threads of a block, `cluster` of which share a row; `visits` is how often a kernel walks over a tile in memory. A long row that
// is read twice gets a whole multiprocessor, so that few rows are in flight and the second read finds its row in the L2 cache;
// otherwise several blocks share one, and one's reductions hide behind another's loads. So many warps that all have as many pieces,
// but for the last round. Reasoned, not measured.
inline int threads_of(int64_t columns, int element_size, int visits, int cluster) {
  const int64_t pieces = pieces_of_block(columns, cluster);
  const int64_t most = (visits > 1 && columns >= 65536 ? most_threads(element_size) : kMostThreadsKept) / 32;
  const int64_t rounds = (pieces + most - 1) / most;
  return 32 * int((pieces + rounds - 1) / rounds);
}

// ---- the row kernels over two tiles

constexpr int kMostThreadsOfTwoTiles = 512;
constexpr int kFewestLanes = 256, kMostLanes = 4096;  // of a row
constexpr int kFewestLanesOfRange = 32;               // of a range: a warp
constexpr int kFewestUnits = 6;                       // of a lane in a longer row, or merging costs more than folding

// Lanes of a row of so many units.
GRPO_SHAPE int lanes_of(int64_t units, int fewest = kFewestLanes) {
  int lanes = fewest;
  while (lanes < kMostLanes && int64_t(2 * kFewestUnits) * lanes <= units) lanes *= 2;
  return lanes;
}

// Statistics of 32 lanes each; the row's are needed by one thread alone.
GRPO_SHAPE constexpr int scratch_of_two_tiles(int element_size) { return kMostLanes / 32 * 8 * (element_size == 8 ? 8 : 4); }

// Threads of a block, which has a row of both.
inline int threads_of_two_tiles(int64_t columns, int element_size) {
  constexpr int in_flight = 4;  // units of a thread
  const int64_t units = units_of(columns, element_size);
  const int lanes = lanes_of(units);
  int threads = 32;
  while (threads < kMostThreadsOfTwoTiles && threads < lanes && int64_t(threads) * in_flight < units) threads *= 2;
  return threads;
}

// ---- the pair kernels

constexpr int kMostPairThreads = 256;
constexpr int kLogitsThreads = 128, kSumsThreads = 256;
constexpr int kRowsOfBlock = 8;  // at least; half of them have two pairs
constexpr int kLongRange = 64;  // pairs; a warp alone adds up as many, more are cut into slices
constexpr int kSlices = 8;
constexpr int kSumsSharedBytes = kSlices * 32 * 2 * kUnitBytes;  // a unit of sums for each lane; those of 16 bits are kept in 32

// Blocks that share kRowsOfBlock rows in pair_logits: so many that a range of thousands is not what all others wait for.
GRPO_SHAPE int blocks_of_rows(int64_t rows) { return rows < 1 << 12 ? 32 : rows < 1 << 14 ? 16 : 8; }

// Blocks of a row in pair_sums, a unit for each lane of a warp.
GRPO_SHAPE int64_t pieces_of_sum(int64_t columns, int element_size) {
  const int64_t bytes = 32 * kUnitBytes;
  return (columns * element_size + bytes - 1) / bytes;
}

// Rows of a block in pair_sums, at most a lane for each. Most rows of a large count are empty: a gradient of the weight's.
GRPO_SHAPE int rows_of_block(int64_t rows) {
  return rows < 1 << 18 ? kRowsOfBlock : rows < 1 << 19 ? 2 * kRowsOfBlock : 4 * kRowsOfBlock;
}

}  // namespace
}  // namespace grpo_kernels
