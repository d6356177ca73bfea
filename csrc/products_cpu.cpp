// out [M, N] = a [M, K] b [K, N] on the CPU, compiled once per instruction set under another GK_ISA.
//
// A number of out depends on its row of a, its column of b, alpha and what it was before, and on nothing else: not on M, N, strides or
// threads. So each is a sum in one fixed order: chains of kChain products in ascending k, from nothing, are added one after another.
// Whatever cuts of K there are beside (kDepth), a chain goes on where it stood.
//
// One operand, x, is packed in panels before all else and read by every thread; of the other, y, a thread packs the panel that it will
// need next while it multiplies. The panel of y at work stays in the first-level cache, a part of x and the unfinished sums in the second.
#include "products_cpu.h"

#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>
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
constexpr int64_t kStreamed = 1 << 20, kUnfinished = 1 << 19;  // bytes of x and of sums in a second-level cache of 2 MB

constexpr int64_t parts(int64_t n, int64_t size) { return (n + size - 1) / size; }
constexpr int64_t filled(int64_t n, int64_t size) { return parts(n, size) * size; }

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

// kTurned: a and b are those of out^T = b^T a^T.
template <class Kernel, class Out, bool kStreamA, bool kTurned>
class Multiplication {
  using Element = typename Kernel::Element;
  using Packed = typename Kernel::Packed;
  using Acc = typename Kernel::Acc;
  static constexpr int64_t kX = kStreamA ? Kernel::kRows : Kernel::kColumns, kY = kStreamA ? Kernel::kColumns : Kernel::kRows;
  static constexpr int64_t kBlock = Kernel::kRows * Kernel::kColumns;
  static constexpr int L = kLanes<Out>;

 public:
  Multiplication(const ProductParams& p, const Operand& a, const Operand& b, int threads)
      : p(p), x(kStreamA ? a : b), y(kStreamA ? b : a), K(p.a_transposed ? p.a.rows : p.a.columns), threads(threads) {
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
    const int64_t groups = parts(y_panels, group), chunks = parts(x_panels, chunk), count = int64_t(pieces.size());
    const int64_t packed_x = x_panels * kX * filled(K, Kernel::kStep);
    constexpr int64_t panel = kY * Kernel::kDepth;
    const int64_t sums = chunk * group * kBlock * (summed() ? 2 : 1);
    const int64_t own = filled(2 * panel * sizeof(Packed) + sums * sizeof(Acc), 4096);  // of one thread
    const int64_t shared = filled(packed_x * sizeof(Packed), 4096);
    const std::unique_ptr<char[], Release> memory(static_cast<char*>(std::aligned_alloc(4096, shared + own * threads)));
    if (!memory) throw std::bad_alloc();
    Packed* const all_x = reinterpret_cast<Packed*>(memory.get());
    char* const scratch = memory.get() + shared;
    int arrived = 0;
#pragma omp parallel num_threads(threads)
    {
      const typename Kernel::Session session;
      (void)session;
      int place;
#pragma omp atomic capture
      place = arrived++;
      char* const mine = scratch + own * place;
#pragma omp for schedule(dynamic, 4)
      for (int64_t i = 0; i < count * x_panels; i++) {
        const Piece& piece = pieces[i / x_panels];
        pack<kStreamA>(x, i % x_panels, piece.begin, piece.end, at(all_x, piece, i % x_panels));
      }
#pragma omp for schedule(dynamic, 1)
      for (int64_t unit = 0; unit < groups * chunks; unit++) {
        Packed* const panels = reinterpret_cast<Packed*>(mine);
        const int64_t y0 = unit / chunks * group, x0 = unit % chunks * chunk;
        work(all_x, panels, reinterpret_cast<Acc*>(panels + 2 * panel), y0, at_most(y_panels, y0 + group), x0,
             at_most(x_panels, x0 + chunk));
      }
    }
  }

 private:
  // Whether the chains are summed up before they go to out.
  bool summed() const { return !straight && chains > 1; }

  Packed* at(Packed* all_x, const Piece& piece, int64_t panel) const {
    return all_x + (piece.begin * x_panels + panel * filled(piece.end - piece.begin, Kernel::kStep)) * kX;
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

  void work(Packed* all_x, Packed* panels, Acc* sums, int64_t y0, int64_t y1, int64_t x0, int64_t x1) const {
    Acc* const totals = sums + (x1 - x0) * (y1 - y0) * kBlock;
    const int64_t count = int64_t(pieces.size());
    int at_work = 0;
    pack<!kStreamA>(y, y0, pieces[0].begin, pieces[0].end, panels);
    int64_t chain = 0;
    for (int64_t i = 0; i < count; i++) {
      const Piece& piece = pieces[i];
      const int64_t depth = filled(piece.end - piece.begin, Kernel::kStep);
      for (int64_t yi = y0; yi < y1; yi++) {
        const Packed* const own = panels + at_work * kY * Kernel::kDepth;
        at_work = 1 - at_work;
        Packed* const next = panels + at_work * kY * Kernel::kDepth;
        const Piece& next_piece = pieces[yi + 1 < y1 ? i : at_most(i + 1, count - 1)];
        const int64_t next_y = yi + 1 < y1 ? yi + 1 : y0;
        const int64_t shares = yi + 1 == y1 && i + 1 == count ? 0 : parts(next_piece.end - next_piece.begin, Kernel::kShare);
        for (int64_t xi = x0; xi < x1; xi++) {
          const int64_t from = shares * (xi - x0) / (x1 - x0) * Kernel::kShare, to = shares * (xi + 1 - x0) / (x1 - x0) * Kernel::kShare;
          if (from < to) {
            const int64_t begin = next_piece.begin + from, end = at_most(next_piece.end, next_piece.begin + to);
            pack<!kStreamA>(y, next_y, begin, end, next + from * kY);
          }
          const int64_t index = (yi - y0) * (x1 - x0) + xi - x0;
          alignas(64) Acc finished[kBlock];
          Acc* const sum = sums + index * kBlock;
          const int64_t ai = kStreamA ? xi : yi, bi = kStreamA ? yi : xi, i0 = ai * Kernel::kRows, j0 = bi * Kernel::kColumns;
          const int64_t rows = at_most((kStreamA ? x : y).count - i0, Kernel::kRows);
          const int64_t columns = at_most((kStreamA ? y : x).count - j0, Kernel::kColumns);
          if (from_out && piece.first) begin_from_out(sum, i0, j0, rows, columns);
          const Packed* const streamed = at(all_x, piece, xi);
          Kernel::template multiply<kStreamA>(kStreamA ? streamed : own, kStreamA ? own : streamed, depth,
                                              piece.first && !from_out ? nullptr : sum, piece.last ? finished : sum, rows, columns);
          if (piece.last) finish(finished, totals + index * kBlock, chain, i0, j0, rows, columns);
        }
      }
      chain += piece.last;
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

  // A chain of a block: to out, or to the sum of chains and with the last one to out.
  void finish(const Acc* block, Acc* total, int64_t chain, int64_t i0, int64_t j0, int64_t rows, int64_t columns) const {
    if constexpr (kTurned) {
      static_assert(Kernel::kRows == Kernel::kColumns);
      constexpr int64_t n = Kernel::kRows;
      alignas(64) Acc turned[kBlock];
      for (int64_t r = 0; r < n; r += L) {
        for (int64_t c = 0; c < n; c += L) {
          transpose_block(reinterpret_cast<const uint32_t*>(block + r * n + c), n, reinterpret_cast<uint32_t*>(turned + c * n + r), n);
        }
      }
      put(turned, total, chain, j0, i0, columns, rows);
    } else {
      put(block, total, chain, i0, j0, rows, columns);
    }
  }

  void put(const Acc* block, Acc* total, int64_t chain, int64_t i0, int64_t j0, int64_t rows, int64_t columns) const {
    Out* const out = static_cast<Out*>(p.out.data) + i0 * p.out.row_stride + j0;
    if (straight) {
      if (!p.continued && (p.add || chain > 0)) {
        return over(out, block, rows, columns, [](auto v, auto before, int64_t) { return before + v; });
      }
      return over(out, block, rows, columns, [](auto v, auto, int64_t) { return v; });
    }
    if (chain + 1 < chains) {
      for (int64_t i = 0; i < rows * Kernel::kColumns; i += L) store(total + i, chain ? load(total + i) + load(block + i) : load(block + i));
      return;
    }
    const Acc alpha = Acc(p.alpha);
    const auto value = [&](auto v, int64_t at) { return (chain ? load(total + at) + v : v) * alpha; };
    if (p.add) return over(out, block, rows, columns, [&](auto v, auto before, int64_t at) { return before + value(v, at); });
    over(out, block, rows, columns, [&](auto v, auto, int64_t at) { return value(v, at); });
  }

  // out = f(of a block's vector, out's, place in the block); the ragged end goes through a copy.
  template <class F>
  void over(Out* out, const Acc* block, int64_t rows, int64_t columns, F f) const {
    for (int64_t r = 0; r < rows; r++, out += p.out.row_stride) {
      for (int64_t c = 0; c < columns; c += L) {
        const int64_t at = r * Kernel::kColumns + c;
        if (columns - c >= L) {
          store(out + c, f(load(block + at), load(out + c), at));
        } else {
          Out some[L] = {};
          std::memcpy(some, out + c, (columns - c) * sizeof(Out));
          store(some, f(load(block + at), load(some), at));
          std::memcpy(out + c, some, (columns - c) * sizeof(Out));
        }
      }
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

template <class Kernel, class Out>
void multiply(const ProductParams& p, int threads) {
  const auto operand = [](const Matrix& m, bool transposed, bool along_rows) {
    const int64_t count = transposed == along_rows ? m.columns : m.rows;
    return Operand{m.data, count, transposed == along_rows ? 1 : m.row_stride, transposed == along_rows ? m.row_stride : 1};
  };
  const Operand a = operand(p.a, p.a_transposed, true), b = operand(p.b, p.b_transposed, false);
  // few rows by a weight whose columns of k are adjacent: packed as rows it is copied, and its many products are turned instead
  if constexpr (Kernel::kTiles) {
    constexpr int64_t kFew = 128;
    if (a.count <= kFew && b.count > a.count && b.along_k == 1) return Multiplication<Kernel, Out, false, true>(p, b, a, threads).run();
  }
  if (a.count <= b.count) return Multiplication<Kernel, Out, true, false>(p, a, b, threads).run();
  Multiplication<Kernel, Out, false, false>(p, a, b, threads).run();
}

template <class T>
void zero(const Matrix& out) {
  for (int64_t r = 0; r < out.rows; r++) std::memset(static_cast<T*>(out.data) + r * out.row_stride, 0, out.columns * sizeof(T));
}

void product(const ProductParams& p, int threads) {
  if (p.out.rows == 0 || p.out.columns == 0) return;
  const bool same = p.out.dtype == p.a.dtype;
  if ((p.a_transposed ? p.a.rows : p.a.columns) == 0) {
    if (p.add) return;
    if (p.out.dtype == Dtype::float64) return zero<double>(p.out);
    return p.out.dtype == Dtype::float32 ? zero<float>(p.out) : zero<bfloat16>(p.out);
  }
  // below 5 us of work a second thread is not worth waking
  const double work = double(p.out.rows) * double(p.out.columns) * double(p.a_transposed ? p.a.rows : p.a.columns);
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
