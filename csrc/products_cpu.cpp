// out [M, N] = a [M, K] b [K, N] on the CPU, compiled once per instruction set under another GK_ISA.
//
// A number of out depends on its row of a, its column of b, alpha and what it was before, and on nothing else: not on M, N, strides
// or threads. So each is a sum in one fixed order: chains of kChain products in ascending k, from nothing, are added one after
// another. Whatever cuts of K there are beside (kDepth), a chain goes on where it stood.
//
// One operand, x, is packed in panels before all else and read by every thread; of the other, y, a thread packs the panels of which
// it makes its part of out. A panel of y at work stays in the first-level cache, a part of x and the unfinished sums in the second.
#include "products_cpu.h"

#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>
#include <vector>

#include "product_vectors_cpu.h"
#ifdef __AMX_BF16__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "product_tiles_cpu.h"
#endif

namespace grpo_kernels {
namespace {

constexpr int64_t kChain = 1024;  // a multiple of every kStep
// Bytes of x and of sums that are read again and again. Of a second-level cache of 2 MB a little over one is to be had where a core
// has two threads: 1024 rows of 896 at 1.1 TFLOP/s with 1 MB of x, at 1.6 with half of it.
constexpr int64_t kStreamed = 1 << 19, kUnfinished = 1 << 19;
constexpr int64_t kAtOnce = 32;  // k, where a group is packed k after k

constexpr int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }
constexpr int64_t filled(int64_t n, int64_t size) { return parts(n, size) * size; }

// out = f(of sums, out, of totals) over a row; a ragged end goes through copies.
template <class Out, class Acc, class F>
GK_INLINE void over(Out* out, const Acc* sums, const Acc* totals, int64_t columns, F f) {
  constexpr int L = kLanes<Out>;
  int64_t c = 0;
  for (; c + L <= columns; c += L) store(out + c, f(load(sums + c), load(out + c), totals + c));
  if (c == columns) return;
  Out some[L] = {};
  Acc own[L] = {}, total[L] = {};
  std::memcpy(some, out + c, (columns - c) * sizeof(Out));
  std::memcpy(own, sums + c, (columns - c) * sizeof(Acc));
  std::memcpy(total, totals + c, (columns - c) * sizeof(Acc));
  store(some, f(load(own), load(some), total));
  std::memcpy(out + c, some, (columns - c) * sizeof(Out));
}

struct Operand {
  const void* data;
  int64_t count, along, along_k;  // rows of a or columns of b; numbers from one to the next, and from one k to the next
};

// A part of K of at most kDepth; first and last: of its chain.
struct Piece {
  int64_t begin, end;
  bool first, last;
};

template <class Kernel>
std::vector<Piece> pieces_of(int64_t K, bool continued) {
  std::vector<Piece> pieces;
  const int64_t chain = continued ? K : kChain;
  for (int64_t from = 0; from < K; from += chain) {
    const int64_t to = at_most(K, from + chain), count = parts(to - from, Kernel::kDepth);
    const int64_t depth = filled(parts(to - from, count), Kernel::kStep);
    for (int64_t k = from; k < to; k += depth) pieces.push_back({k, at_most(to, k + depth), k == from, k + depth >= to});
  }
  return pieces;
}

struct Release {
  void operator()(void* p) const { std::free(p); }
};

int64_t depth_of(const ProductParams& p) { return p.a_transposed ? p.a.rows : p.a.columns; }

// kTurned: a and b are those of out^T = b^T a^T.
template <class Kernel, class Out, bool kStreamA, bool kTurned>
class Multiplication {
  using Element = typename Kernel::Element;
  using Packed = typename Kernel::Packed;
  using Acc = typename Kernel::Acc;
  static constexpr int64_t kX = kStreamA ? Kernel::kRows : Kernel::kColumns, kY = kStreamA ? Kernel::kColumns : Kernel::kRows;
  static constexpr int64_t kBlock = Kernel::kRows * Kernel::kColumns;
  static constexpr int L = kLanes<Out>;
  static constexpr bool kRowsOfX = kStreamA || kTurned;  // the rows of out are x's

 public:
  Multiplication(const ProductParams& p, const Operand& a, const Operand& b, int threads)
      : p(p), x(kStreamA ? a : b), y(kStreamA ? b : a), K(depth_of(p)), threads(threads) {
    pieces = pieces_of<Kernel>(K, p.continued);
    straight = p.alpha == 1 && std::is_same_v<Out, Acc>;
    from_out = p.continued && p.add;
    for (const Piece& piece : pieces) chains += piece.first;
    x_panels = parts(x.count, kX);
    y_panels = parts(y.count, kY);
    const int64_t chunks = parts(x_panels * kX * Kernel::kDepth * int64_t(sizeof(Packed)), kStreamed);
    chunk = parts(x_panels, chunks);
    // a group of panels of y shares what is read of x
    const int64_t unfinished = chunk * kBlock * int64_t(sizeof(Acc)) * (summed() ? 2 : 1);
    const int64_t most = kUnfinished > unfinished ? kUnfinished / unfinished : 1;
    group = parts(y_panels, filled(parts(y_panels, most), threads));
  }

  void run() {
    const int64_t units = parts(y_panels, group), count = int64_t(pieces.size());
    const int64_t packed_x = x_panels * kX * filled(K, Kernel::kStep);
    const int64_t packed_y = kY * (kept() ? group * filled(K, Kernel::kStep) : Kernel::kDepth);
    const int64_t sums = chunk * group * kBlock * (summed() ? 2 : 1);
    const int64_t each = filled(packed_y * sizeof(Packed) + sums * sizeof(Acc), 4096);  // of one thread
    const int64_t shared = filled(packed_x * sizeof(Packed), 4096);
    const std::unique_ptr<char[], Release> memory(static_cast<char*>(std::aligned_alloc(4096, shared + each * threads)));
    if (!memory) throw std::bad_alloc();
    Packed* const all_x = reinterpret_cast<Packed*>(memory.get());
    char* const scratch = memory.get() + shared;
    int64_t arrived = 0;
#pragma omp parallel num_threads(threads)
    {
      const typename Kernel::Session session;
      (void)session;
      int64_t place;
#pragma omp atomic capture
      place = arrived++;
      char* const mine = scratch + each * place;
#pragma omp for schedule(dynamic, 4)
      for (int64_t i = 0; i < count * x_panels; i++) {
        const Piece& piece = pieces[i / x_panels];
        pack<kStreamA>(x, i % x_panels, piece.begin, piece.end, at(all_x, x_panels, kX, piece, i % x_panels));
      }
      Packed* const own = reinterpret_cast<Packed*>(mine);
      Acc* const sums = reinterpret_cast<Acc*>(own + packed_y);
#pragma omp for schedule(dynamic, 1)
      for (int64_t unit = 0; unit < units; unit++) {
        const int64_t y0 = unit * group, y1 = at_most(y_panels, y0 + group);
        for (int64_t x0 = 0; x0 < x_panels; x0 += chunk) {
          int64_t chain = 0;
          for (const Piece& piece : pieces) {
            work(all_x, own, sums, piece, chain, y0, y1, x0, at_most(x_panels, x0 + chunk));
            chain += piece.last;
          }
        }
      }
    }
  }

 private:
  // Whether the chains are summed up before they go to out.
  bool summed() const { return !straight && chains > 1; }

  // A packed panel: panels of one piece are adjacent.
  static Packed* at(Packed* packed, int64_t panels, int64_t width, const Piece& piece, int64_t panel) {
    return packed + (piece.begin * panels + panel * filled(piece.end - piece.begin, Kernel::kStep)) * width;
  }

  template <bool kA>
  static void pack(const Operand& operand, int64_t panel, int64_t begin, int64_t end, Packed* out) {
    const int64_t first = panel * (kA ? Kernel::kRows : Kernel::kColumns), count = operand.count - first;
    const Element* in = static_cast<const Element*>(operand.data) + first * operand.along + begin * operand.along_k;
    if (kA) {
      Kernel::pack_a(in, operand.along, operand.along_k, count, end - begin, out);
    } else {
      Kernel::pack_b(in, operand.along, operand.along_k, count, end - begin, out);
    }
  }

  // Whether the packed panels of a group are kept: they are needed again, or packed together.
  bool kept() const { return chunk < x_panels || scattered(); }

  // Whether numbers of one k are adjacent, and those of the next k on another page: a group's are then packed k after k.
  bool scattered() const { return y.along == 1 && y.along_k * int64_t(sizeof(Element)) >= 4096; }

  void pack_group(const Piece& piece, int64_t y0, int64_t y1, Packed* all_y) const {
    for (int64_t k = piece.begin; k < piece.end; k += kAtOnce) {
      for (int64_t yi = y0; yi < y1; yi++) {
        pack<!kStreamA>(y, yi, k, at_most(piece.end, k + kAtOnce), at(all_y, group, kY, piece, yi - y0) + (k - piece.begin) * kY);
      }
    }
  }

  // A piece of K for panels [y0, y1) and [x0, x1).
  void work(Packed* all_x, Packed* all_y, Acc* sums, const Piece& piece, int64_t chain, int64_t y0, int64_t y1, int64_t x0,
            int64_t x1) const {
    const int64_t high = y1 - y0, wide = x1 - x0, depth = filled(piece.end - piece.begin, Kernel::kStep);
    const bool leaves = piece.last && (straight || chain + 1 == chains);
    Acc* const totals = summed() ? sums + wide * high * kBlock : sums;
    if (x0 == 0 && scattered()) pack_group(piece, y0, y1, all_y);
    for (int64_t yi = y0; yi < y1; yi++) {
      Packed* const own = kept() ? at(all_y, group, kY, piece, yi - y0) : all_y;
      // At once: packed in parts between the calls, the next panel would push this one out of the first-level cache, 3 ms of 8.
      if (x0 == 0 && !scattered()) pack<!kStreamA>(y, yi, piece.begin, piece.end, own);
      for (int64_t xi = x0; xi < x1; xi++) {
        const int64_t index = (yi - y0) * (x1 - x0) + xi - x0;
        Acc* const sum = sums + index * kBlock;
        const int64_t i0 = (kStreamA ? xi : yi) * Kernel::kRows, j0 = (kStreamA ? yi : xi) * Kernel::kColumns;
        const int64_t rows = at_most((kStreamA ? x : y).count - i0, Kernel::kRows);
        const int64_t columns = at_most((kStreamA ? y : x).count - j0, Kernel::kColumns);
        if (from_out && piece.first) begin_from_out(sum, i0, j0, rows, columns);
        const Packed* const streamed = at(all_x, x_panels, kX, piece, xi);
        Kernel::template multiply<kStreamA>(kStreamA ? streamed : own, kStreamA ? own : streamed, depth,
                                            piece.first && !from_out ? nullptr : sum, sum, rows, columns);
        if (!piece.last) continue;
        if (kTurned) turn(sum);
        if (!leaves) add_up(sum, totals + index * kBlock, chain);
        // A row of out is written over all panels at hand: 64 bytes of each row at a time, 16 KB apart, took longer than the
        // products.
        if (leaves && kRowsOfX && yi + 1 == y1) deliver(sums, totals, chain, xi, xi + 1, y0, y1, x0, x1);
      }
      if (leaves && !kRowsOfX) deliver(sums, totals, chain, yi, yi + 1, x0, x1, y0, y1);
    }
  }

  void begin_from_out(Acc* sum, int64_t i0, int64_t j0, int64_t rows, int64_t columns) const {
    const Acc* out = static_cast<const Acc*>(p.out.data);
    const int64_t along = kTurned ? 1 : p.out.row_stride, across = kTurned ? p.out.row_stride : 1;
    for (int64_t r = 0; r < Kernel::kRows; r++) {
      for (int64_t c = 0; c < Kernel::kColumns; c++) {
        const bool there = r < rows && c < columns;
        sum[r * Kernel::kColumns + c] = there ? out[(i0 + r) * along + (j0 + c) * across] : Acc(0);
      }
    }
  }

  static void add_up(const Acc* sum, Acc* total, int64_t chain) {
    for (int64_t i = 0; i < kBlock; i += L) store(total + i, chain ? load(total + i) + load(sum + i) : load(sum + i));
  }

  static void turn(Acc* block) {
    static_assert(!kTurned || Kernel::kRows == Kernel::kColumns);
    constexpr int64_t n = Kernel::kColumns;
    alignas(64) Acc turned[kBlock];
    for (int64_t r = 0; r < n; r += L) {
      for (int64_t c = 0; c < n; c += L) {
        transpose_block(reinterpret_cast<const uint32_t*>(block + r * n + c), n, reinterpret_cast<uint32_t*>(turned + c * n + r), n);
      }
    }
    std::memcpy(block, turned, sizeof turned);
  }

  // The last chain, or each one where they go straight to out, of rows in panels [r0, r1) and columns in panels [c0, c1).
  void deliver(const Acc* sums, const Acc* totals, int64_t chain, int64_t r0, int64_t r1, int64_t c0, int64_t c1, int64_t first,
               int64_t end) const {
    const auto each = [&](auto f) {
      constexpr int64_t kR = kTurned ? Kernel::kColumns : Kernel::kRows, kC = kTurned ? Kernel::kRows : Kernel::kColumns;
      for (int64_t panel = r0; panel < r1; panel++) {
        const int64_t rows = at_most(p.out.rows - panel * kR, kR);
        for (int64_t r = 0; r < rows; r++) {
          Out* const out = static_cast<Out*>(p.out.data) + (panel * kR + r) * p.out.row_stride;
          for (int64_t c = c0; c < c1; c++) {
            const int64_t index = kRowsOfX ? (c - c0) * (end - first) + panel - first : (panel - first) * (c1 - c0) + c - c0;
            const int64_t at = index * kBlock + r * kC;
            over(out + c * kC, sums + at, totals + at, at_most(p.out.columns - c * kC, kC), f);
          }
        }
      }
    };
    const Acc alpha = Acc(p.alpha);
    const auto value = [&](auto v, const Acc* total) { return (chain ? load(total) + v : v) * alpha; };
    if (straight && !p.continued && (p.add || chain > 0)) {
      each([](auto v, auto before, const Acc*) { return before + v; });
    } else if (straight) {
      each([](auto v, auto, const Acc*) { return v; });
    } else if (p.add) {
      each([&](auto v, auto before, const Acc* total) { return before + value(v, total); });
    } else {
      each([&](auto v, auto, const Acc* total) { return value(v, total); });
    }
  }

  const ProductParams& p;
  const Operand x, y;
  const int64_t K;
  const int threads;
  std::vector<Piece> pieces;
  bool straight;  // each chain goes to out at once
  bool from_out;  // the one chain starts from what out holds
  int64_t chains = 0, x_panels, y_panels, chunk, group;
};

// The k in [begin, end) of a product.
ProductParams part_of(const ProductParams& p, int64_t element, int64_t begin, int64_t end) {
  ProductParams part = p;
  for (const auto& [m, rows] : {std::pair(&part.a, p.a_transposed), std::pair(&part.b, !p.b_transposed)}) {
    m->data = static_cast<char*>(m->data) + begin * element * (rows ? m->row_stride : 1);
    (rows ? m->rows : m->columns) = end - begin;
  }
  return part;
}

template <class Kernel, class Out>
void multiply_part(const ProductParams& p, int threads) {
  const auto operand = [](const Matrix& m, bool along_rows) {
    return along_rows ? Operand{m.data, m.columns, 1, m.row_stride} : Operand{m.data, m.rows, m.row_stride, 1};
  };
  const Operand a = operand(p.a, p.a_transposed), b = operand(p.b, !p.b_transposed);
  // few rows by a weight whose columns of k are adjacent: packed as rows it is copied, and its many products are turned instead
  if constexpr (Kernel::kTiles) {
    constexpr int64_t kFew = 128;
    if (a.count <= kFew && b.count > a.count && b.along_k == 1) {
      return Multiplication<Kernel, Out, false, true>(p, b, a, threads).run();
    }
  }
  if (a.count <= b.count) return Multiplication<Kernel, Out, true, false>(p, a, b, threads).run();
  Multiplication<Kernel, Out, false, false>(p, a, b, threads).run();
}

// Where the sums are fewer than the numbers of x, K is cut and the sums are kept: x is then packed into memory that stays in the
// caches.
template <class Kernel, class Out>
void multiply(const ProductParams& p, int threads) {
  using Acc = typename Kernel::Acc;
  using Element = typename Kernel::Element;
  constexpr int64_t kPackedAtOnce = 2 << 20;
  const int64_t M = p.out.rows, N = p.out.columns, K = depth_of(p);
  const int64_t packed = at_most(M, N) * K * int64_t(sizeof(typename Kernel::Packed));
  if (packed <= kPackedAtOnce || M * N * int64_t(sizeof(Acc)) >= packed) return multiply_part<Kernel, Out>(p, threads);
  const int64_t some = parts(K, parts(packed, kPackedAtOnce)), depth = filled(some, kChain);
  const bool straight = p.alpha == 1 && std::is_same_v<Out, Acc>;
  const std::unique_ptr<Acc[], Release> memory(straight ? nullptr : static_cast<Acc*>(std::malloc(M * N * sizeof(Acc))));
  if (!straight && !memory) throw std::bad_alloc();
  Acc* const sums = memory.get();
  for (int64_t k = 0; k < K; k += depth) {
    ProductParams part = part_of(p, sizeof(Element), k, at_most(K, k + depth));
    part.add = (straight && p.add) || k > 0;
    part.alpha = 1;
    if (!straight) part.out = {sums, M, N, N, sizeof(Acc) == 8 ? Dtype::float64 : Dtype::float32};
    multiply_part<Kernel, Acc>(part, threads);
  }
  if (straight) return;
  const Acc alpha = Acc(p.alpha);
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < M; r++) {
    Out* const out = static_cast<Out*>(p.out.data) + r * p.out.row_stride;
    if (p.add) {
      over(out, sums + r * N, sums, N, [&](auto v, auto before, const Acc*) { return before + v * alpha; });
    } else {
      over(out, sums + r * N, sums, N, [&](auto v, auto, const Acc*) { return v * alpha; });
    }
  }
}

template <class T>
void zero(const Matrix& out) {
  for (int64_t r = 0; r < out.rows; r++) std::memset(static_cast<T*>(out.data) + r * out.row_stride, 0, out.columns * sizeof(T));
}

void product(const ProductParams& p, int threads) {
  if (p.out.rows == 0 || p.out.columns == 0) return;
  const bool same = p.out.dtype == p.a.dtype;
  if (depth_of(p) == 0) {
    if (p.add) return;
    if (p.out.dtype == Dtype::float64) return zero<double>(p.out);
    return p.out.dtype == Dtype::float32 ? zero<float>(p.out) : zero<bfloat16>(p.out);
  }
  // below 5 us of work a second thread is not worth waking
  const double work = double(p.out.rows) * double(p.out.columns) * double(depth_of(p));
  if (work < 1 << 18) threads = 1;
  if (p.a.dtype == Dtype::float64) return multiply<VectorKernel<double>, double>(p, threads);
  if (p.a.dtype == Dtype::float32) return multiply<VectorKernel<float>, float>(p, threads);
#ifdef __AMX_BF16__
  using Bfloat16 = TileKernel;
#else
  using Bfloat16 = VectorKernel<bfloat16>;
#endif
  if (same) return multiply<Bfloat16, bfloat16>(p, threads);
  multiply<Bfloat16, float>(p, threads);
}

}  // namespace

namespace products {
extern const Product GK_ISA;
const Product GK_ISA = product;
}  // namespace products

#ifdef __AMX_BF16__
bool amx_usable() {
  unsigned eax, ebx, ecx, edx;
  constexpr unsigned kTiles = 1u << 24, kBfloat16Tiles = 1u << 22, kBfloat16Vectors = 1u << 5;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (~edx & (kTiles | kBfloat16Tiles))) return false;
  if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || !(eax & kBfloat16Vectors)) return false;
  // Linux saves the 8 KB of tile registers for those processes only that have asked for it.
  constexpr int kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#endif

}  // namespace grpo_kernels
