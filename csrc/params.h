// What the compiled row kernels are handed: plain data, no framework; grpo_kernels/backends/params.py fills it in.
//
// R rows and C columns of a tile of logits; `acc` is float, or double for float64 tiles. Vectors [R] are contiguous; a null
// pointer stands for "absent" wherever a field says it may be.
#pragma once

#include <cstdint>

namespace grpo_kernels {

enum class Dtype : int { float32, bfloat16, float64, float16 };  // float16: CUDA only

enum class PolicyKind : int { clipped, cispo, sapo, linear };  // in the order of KINDS in grpo_kernels/losses/terms.py

struct Matrix {
  void* data;  // [R, C], elements of one row adjacent
  int64_t rows, columns;
  int64_t row_stride;  // elements from one row to the next; negative or below C is allowed for R <= 1 only
  Dtype dtype;
};

// z = softcap * tanh(logit_scale * (raw + bias) / softcap) / temperature
struct Transform {
  double logit_scale;
  double softcap;      // 0: none
  double temperature;  // used where the tile has none of its own
};

struct Tile {
  Matrix values;          // raw logits
  const int64_t* target;  // [R], relative to the tile's first column; outside [0, C): not in this tile
  Transform transform;
  const void* bias;         // acc [C] or null; may hold -inf
  const void* temperature;  // acc [R] or null
  // [R, 2] or null. Row r is then the elements [first, last) of the acc [M] behind values.data; `rows` is R, `columns` is M, there
  // is no bias, target is relative to `first`, and a result lies on the tile.
  const int64_t* ranges;
};

struct Scored {
  void* logps;    // acc [R]
  void* lse;      // acc [R]
  void* entropy;  // acc [R]
};

// A row's statistics are those of its fixed tiles of columns, each of which begins with nothing, merged from left to right and rounded to
// acc after each: the bits do not depend on where a row is cut between two of them.
constexpr int64_t kTileColumns = 4096;

struct StatisticsParams {
  Tile tile;
  // acc [R, parts, 4]: the maximum up to rounding; sum of exp(z - max) without the target; sum of (z - max) exp(z - max);
  // target's z. With `squares` [R, parts, 5]: sum of exp(2 (z - max)) without the target. With one part all tiles are merged into
  // it; with more, of which there is one for each tile, each into its own.
  void* stats;
  int64_t parts;
  bool squares;
};

// What is known of rows whose columns were all seen: the parts merged from left to right.
struct CloseParams {
  const void* stats;  // acc [R, parts, 4], with `squared` 5
  int64_t rows, parts;
  Dtype dtype;  // acc
  Scored scored;
  void* squared;  // acc [R], sum of p^2 over all columns but the target; or null
};

struct GradientParams {
  Tile tile;
  Matrix out;  // the tile's own memory in its dtype, or memory of its own
  Scored scored;
  const void* g;          // acc [R], d loss / d logps
  const void* g_entropy;  // acc [R], d loss / d entropy, or null
};

struct PolicyRows {
  const void* w_policy;    // acc [R] or null: no policy term
  const void* advantages;  // acc [R]; may be null for `linear`
  const void* old;         // acc [R] or null: on-policy, ratio 1
  const void* ref;         // acc [R] or null: no KL
  const void* w_kl;        // acc [R]; null only without `ref`
  const void* w_entropy;   // acc [R] or null: no entropy term
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
  Tile tile;
  Matrix out;  // as of GradientParams
  PolicyRows rows;
  PolicyTerms terms;
  Scored scored;  // written
};

// R rows of one matrix, each with a range of rows of another.
struct Pairs {
  const int64_t* ids;     // [M], rows of the other matrix; an id outside of it is no pair
  const int64_t* ranges;  // [R, 2]: row r has the pairs [first, last), which may be none
  const int64_t* rows;    // [R], where the rows are in their matrix, each once; null: row r is the r-th. Hidden's are inside of it
  int64_t count;          // R
};

struct PairLogitsParams {
  Pairs pairs;
  Matrix hidden;     // [.., K], K >= 1
  Matrix weight;     // [V, K], of hidden's dtype
  const void* bias;  // acc [V] or null; may hold -inf
  void* out;         // acc [M]; an id outside of the weight gives -inf, or with `add` nothing
  double scale;      // of the dot product
  bool add;          // to out
};

struct PairSumsParams {
  Pairs pairs;    // rows are out's, and one outside of it is left alone, as is one without a pair; ids are source's
  const void* g;  // acc [M]
  Matrix source;  // [.., K], K >= 1
  Matrix out;     // [.., K], of source's dtype or acc
  double scale;   // of the sum
  bool add;       // to out, before it is rounded
};

enum class DivergenceKind : int { forward_kl, reverse_kl, jsd };  // in the order of KINDS in grpo_kernels/backends/comparison.py

// Logits of a student and of a teacher over the same rows and columns, of one dtype; both have a temperature, or neither.
struct TwoTiles {
  Tile student;
  Tile teacher;  // whose target is of no use
};

struct Compared {
  void* gap;    // acc [R], lse of the student - lse of the teacher
  void* own;    // acc [R], what the gradient subtracts; of no use for forward_kl
  void* value;  // acc [R], the divergence
};

struct ComparisonParams {
  TwoTiles tiles;
  void* stats;  // acc [R, 8]: the student's four; the teacher's max y, sum of exp(y - max y); sums of weight x and weight bend(x)
  DivergenceKind kind;
};

struct JensenShannonParams {
  TwoTiles tiles;
  Scored scored;    // of the student
  const void* gap;  // acc [R]
  void* sums;       // acc [R, 2]: KL(p || m) and the divergence, added to
  double beta;
};

struct DivergenceGradientParams {
  TwoTiles tiles;
  Matrix out;  // as of GradientParams, of the student
  Scored scored;
  Compared compared;         // but for value
  const void* g_divergence;  // acc [R], d loss / d divergence
  const void* g;             // acc [R] or null, d loss / d logps of the student's target
  const void* g_entropy;     // acc [R] or null
  DivergenceKind kind;
  double beta;
};

struct DivergenceParams {  // whole rows
  TwoTiles tiles;
  Matrix out;
  const void* g_divergence;
  DivergenceKind kind;
  double beta;
  Scored scored;      // written
  Compared compared;  // written
};

// out = a b, [M, K] by [K, N]. Where `transposed`, the matrix is the transpose of what is described: rows and columns of params.a
// are then those of a^T.
struct ProductParams {
  Matrix a, b;  // of one dtype
  Matrix out;   // [M, N], of the inputs' dtype or acc
  bool a_transposed, b_transposed;
  bool add;        // to what out holds
  bool continued;  // one chain of sums over all of K; with add it starts from what out holds, which is acc; alpha is 1
  double alpha;
};

struct TransposeParams {
  Matrix matrix;
  void* out;  // [C, R], contiguous, of the same dtype
};

}  // namespace grpo_kernels
