// What the compiled row kernels are handed: plain data, no framework.
//
// R rows and C columns of a tile of logits; `acc` is float, or double for float64 tiles. Vectors [R] are contiguous; a null
// pointer stands for "absent" wherever a field says it may be.
#pragma once

#include <cstdint>

namespace grpo_kernels {

enum class Dtype : int { float32 = 0, bfloat16 = 1, float64 = 2, float16 = 3 };  // float16: CUDA only

enum class PolicyKind : int { clipped = 0, cispo = 1, sapo = 2, linear = 3 };

struct Tile {
  void* data;          // [R, C], elements of one row adjacent
  int64_t rows;        // R
  int64_t columns;     // C
  int64_t row_stride;  // elements from one row to the next; negative or below C is allowed for R <= 1 only
  Dtype dtype;
};

// Where a kernel's result goes, on CUDA; the CPU's kernels work in place. The tile's own memory in a narrower dtype (rows on
// rows, in one kernel launch), or memory of its own.
struct Output {
  void* data;          // [R, C], elements of one row adjacent; null: over the tile, in its dtype
  int64_t row_stride;  // elements of `dtype`
  Dtype dtype;
};

// z = softcap * tanh(logit_scale * (raw + bias) / softcap) / temperature
struct Transform {
  double logit_scale;
  double softcap;              // 0: none
  double temperature;          // used when `row_temperature` is null
  const void* bias;            // acc [C] or null; may hold -inf
  const void* row_temperature; // acc [R] or null
};

struct StatisticsParams {
  Tile tile;
  Transform transform;
  const int64_t* target;  // [R], relative to the tile's first column; outside [0, C): not in this tile
  void* stats;            // acc [R, 4]: max, sum of exp(z - max) without the target, sum of (z - max) exp(z - max), target's z
  bool probs;             // overwrite the tile by softmax(z)
  Output out;
};

struct GradientParams {
  Tile tile;  // raw logits, or p when `from_probs`; overwritten by dz
  Transform transform;
  const int64_t* target;  // [R]
  const void* lse;        // acc [R]
  const void* logps;      // acc [R]
  const void* entropy;    // acc [R]
  const void* g;          // acc [R], d loss / d logps
  const void* g_entropy;  // acc [R], d loss / d entropy, or null
  bool from_probs;
  Output out;
};

struct PolicyTerms {
  PolicyKind kind;
  double epsilon_low;           // clip range is [1 - epsilon_low, 1 + epsilon_high]; cispo's cap is epsilon_high itself
  double epsilon_high;
  double delta;                 // upper bound of the ratio in the unclipped branch; infinity: none
  double sapo_temperature_pos;  // of rows with advantage > 0
  double sapo_temperature_neg;  // of the others
  bool use_bias_correction_kl;
};

struct PolicyParams {
  Tile tile;  // raw logits, overwritten by dz
  Transform transform;
  PolicyTerms terms;
  const int64_t* target;   // [R]
  const void* old;         // acc [R] or null: on-policy, ratio 1
  const void* ref;         // acc [R] or null: no KL
  const void* advantages;  // acc [R]; may be null for `linear`
  const void* w_policy;    // acc [R] or null: no policy term
  const void* w_kl;        // acc [R]; null only without `ref`
  const void* w_entropy;   // acc [R] or null: no entropy term
  void* logps;             // acc [R], written
  void* entropy;           // acc [R], written
  Output out;
};

struct TransposeParams {
  Tile tile;
  void* out;  // [C, R], contiguous, the tile's dtype
};

}  // namespace grpo_kernels
