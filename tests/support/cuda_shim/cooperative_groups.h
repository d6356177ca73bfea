// The cluster of this thread's block.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  static unsigned block_rank() { return shim::cluster_rank(); }
  static unsigned num_blocks() { return shim::cluster_blocks(); }
  static void barrier_arrive(int line = __builtin_LINE()) { shim::cluster_arrive(line); }
  static void barrier_wait(int line = __builtin_LINE()) { shim::cluster_wait(line); }
  static void sync(int line = __builtin_LINE()) {
    barrier_arrive(line);
    barrier_wait(line);
  }
  template <class T>
  static T* map_shared_rank(T* own, int rank) {
    return static_cast<T*>(shim::map_shared(own, rank));
  }
};

}  // namespace cooperative_groups
