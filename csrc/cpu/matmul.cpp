// A task is a block of C. Its part of B is packed, a block of K at a time, into slivers as wide as a register
// tile; A's rows are read where they lie, if they are contiguous and of the right dtype, else from a packed
// copy. An element of C is one sum over K in order, whatever the block: its bits depend on K alone.
//
// A word is what one lane multiplies: a float, or a pair of bfloat16 from two steps of K.
#include "matmul.h"

#include <cstdlib>

#include "math.h"

namespace rk {
namespace RK_ISA {
namespace {

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
inline void fill(T* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = 0;
}

template <class A, class B>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// Memory for packed words, on a cache line.
struct Words {
  uint32_t* data;
  explicit Words(int64_t count)
      : data(static_cast<uint32_t*>(aligned_alloc(64, (sizeof(uint32_t) * count + 63) / 64 * 64))) {
    if (count && !data) abort();
  }
  ~Words() { free(data); }
};

constexpr int kVectors = 2;  // of a register tile's columns
constexpr int kSliver = kVectors * kLanes;
constexpr int kTileRows = kBytes == 64 ? 12 : 6;
constexpr int64_t kDepth = 128;  // words of K in a block: longer sums in one accumulator are less exact
constexpr int64_t kPanel = kMatmulPanel;

template <class T>
inline float widened(T x);
template <>
inline float widened(float x) {
  return x;
}
template <>
inline float widened(BFloat x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
template <>
inline float widened(Half x) {
  alignas(16) Half some[kLanes] = {x};
  return load(some)[0];
}

// Round to nearest even; NaN stays NaN.
inline uint16_t to_bfloat(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  if (x != x) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
template <class T>
inline uint16_t narrowed(T x) {
  if constexpr (kSame<T, BFloat>) return x.bits;
  return to_bfloat(widened(x));
}

// What a word holds of K.
struct Floats {
  static constexpr int64_t kPerWord = 1;

  // kLanes words along K.
  template <class T>
  static vu along_k(const T* x) {
    return reinterpret_cast<vu>(load(x));
  }
  // The words at one step of K of kLanes neighbours; `next` is the distance of the step after it.
  template <class T>
  static vu across_k(const T* x, int64_t) {
    return reinterpret_cast<vu>(load(x));
  }
  // One word; `left` elements of K from x on, `step` apart, and after the last one comes 0.
  template <class T>
  static uint32_t word(const T* x, int64_t, int64_t) {
    const float value = widened(*x);
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
  }
};

#ifdef __AVX512BF16__
struct Pairs {
  static constexpr int64_t kPerWord = 2;

  template <class T>
  static vu along_k(const T* x) {
    if constexpr (kSame<T, BFloat>) return *reinterpret_cast<const vu_unaligned*>(x);
    return reinterpret_cast<vu>(_mm512_cvtne2ps_pbh(load(x + kLanes), load(x)));
  }
  template <class T>
  static vu across_k(const T* x, int64_t next) {
    return rounded(x) | rounded(x + next) << 16;
  }
  template <class T>
  static uint32_t word(const T* x, int64_t step, int64_t left) {
    const uint32_t low = narrowed(*x), high = left > 1 ? narrowed(x[step]) : 0;
    return low | high << 16;
  }

 private:
  // kLanes elements as bfloat16, each in the lower half of a lane.
  template <class T>
  static vu rounded(const T* x) {
    if constexpr (kSame<T, BFloat>) return load_bits(x);
    const __m256bh bits = _mm512_cvtneps_pbh(load(x));
    return reinterpret_cast<vu>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(bits)));
  }
};
#endif

// Stage of a transposition: blocks of D x D beside the diagonal change places.
template <int D, int... L>
inline void swap_blocks(vu (&x)[kLanes], std::integer_sequence<int, L...>) {
  for (int i = 0; i < kLanes; ++i) {
    if (i & D) continue;
    const vu upper = x[i], lower = x[i + D];
    x[i] = RK_SHUFFLE(upper, lower, ((L & D) ? kLanes + L - D : L)...);
    x[i + D] = RK_SHUFFLE(upper, lower, ((L & D) ? kLanes + L : L + D)...);
  }
}

inline void transpose(vu (&x)[kLanes]) {
  constexpr std::make_integer_sequence<int, kLanes> lanes;
  if constexpr (kLanes > 8) swap_blocks<8>(x, lanes);
  if constexpr (kLanes > 4) swap_blocks<4>(x, lanes);
  swap_blocks<2>(x, lanes);
  swap_blocks<1>(x, lanes);
}

inline void store(uint32_t* to, vu x) { *reinterpret_cast<vu_unaligned*>(to) = x; }

// A rows x words part of a matrix as words: at to[i * to_row + w * to_column], of which one is 1. `row` and
// `column` are the distances of the elements, `k` how many of K there are.
template <class Arithmetic, class T>
void pack(const T* from, int64_t row, int64_t column, int64_t rows, int64_t words, int64_t k, uint32_t* to,
          int64_t to_row, int64_t to_column) {
  constexpr int64_t per = Arithmetic::kPerWord;
  const int64_t whole = k / per;  // words without a missing half
  const bool along = column == 1, across = row == 1 && !along;
  const auto source = [&](int64_t i, int64_t w) { return from + i * row + w * per * column; };
  int64_t i = 0;
  for (; (along || across) && i + kLanes <= rows; i += kLanes) {
    int64_t w = 0;
    for (; w + kLanes <= smaller(words, whole); w += kLanes) {
      vu x[kLanes];
      for (int l = 0; l < kLanes; ++l)
        x[l] = along ? Arithmetic::along_k(source(i + l, w)) : Arithmetic::across_k(source(i, w + l), column);
      if (along != (to_column == 1)) transpose(x);
      for (int l = 0; l < kLanes; ++l)
        store(to + (to_column == 1 ? (i + l) * to_row + w : i + (w + l) * to_column), x[l]);
    }
    for (; w < words; ++w)
      for (int l = 0; l < kLanes; ++l)
        to[(i + l) * to_row + w * to_column] = Arithmetic::word(source(i + l, w), column, k - w * per);
  }
  for (; i < rows; ++i)
    for (int64_t w = 0; w < words; ++w)
      to[i * to_row + w * to_column] = Arithmetic::word(source(i, w), column, k - w * per);
}

// columns x words of B into slivers [words][kSliver], the last one filled up with zeros.
template <class Arithmetic, class T>
void pack_slivers(const T* from, int64_t row, int64_t column, int64_t columns, int64_t words, int64_t k,
                  uint32_t* to) {
  constexpr int64_t per = Arithmetic::kPerWord;
  // Where rows are contiguous, few of them at a time: each is a page of its own.
  const int64_t step = column == 1 ? 2 * kLanes : words;
  for (int64_t w = 0; w < words; w += step)
    for (int64_t j = 0; j < columns; j += kSliver) {
      const int64_t count = smaller(kSliver, columns - j), some = smaller(step, words - w);
      uint32_t* place = to + j * words + w * kSliver;
      if (count < kSliver) fill(place, some * kSliver);
      pack<Arithmetic>(from + j * column + w * per * row, column, row, count, some, k - w * per, place, 1,
                       kSliver);
    }
}

inline vf multiply_add(Floats, uint32_t a, vf b, vf sum) {
  float x;
  memcpy(&x, &a, sizeof(x));
  return sum + x * b;
}

#ifdef __AVX512BF16__
inline vf multiply_add(Pairs, uint32_t a, vf b, vf sum) {
  const __m512i left = _mm512_set1_epi32(static_cast<int>(a));
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(left), reinterpret_cast<__m512bh>(b));
}
#endif

// A register tile: kRows rows of A, `stride` words apart, times a sliver of B.
template <class Arithmetic, int kRows>
void tile(const uint32_t* a, int64_t stride, const float* b, int64_t words, float* c, int64_t c_row,
          int64_t columns, bool add) {
  // Three rows from one pointer: an address has one index, which may be doubled.
  constexpr int kGroups = (kRows + 2) / 3;
  const uint32_t* group[kGroups];
  for (int g = 0; g < kGroups; ++g) group[g] = a + 3 * g * stride;
  vf sum[kRows][kVectors] = {};
  for (int64_t w = 0; w < words; ++w) {
    vf right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + w * kSliver + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      uint32_t left;
      memcpy(&left, group[r / 3] + (r % 3) * stride, sizeof(left));
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[r][v] = multiply_add(Arithmetic(), left, right[v], sum[r][v]);
    }
    for (int g = 0; g < kGroups; ++g) ++group[g];
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    float* to = c + r * c_row;
    if (columns == kSliver) {
      for (int v = 0; v < kVectors; ++v) {
        float* place = to + v * kLanes;
        store(place, add ? load(place) + sum[r][v] : sum[r][v]);
      }
    } else {
      float row[kSliver];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) store(row + v * kLanes, sum[r][v]);
      for (int64_t j = 0; j < columns; ++j) to[j] = add ? to[j] + row[j] : row[j];
    }
  }
}

// Rows of A from the i-th on, kRows at a time, times a packed panel of B; returns where it stopped.
template <class Arithmetic, int kRows>
int64_t tiles(int64_t i, const uint32_t* a, int64_t stride, int64_t rows, const float* b, int64_t columns,
              int64_t words, float* c, int64_t c_row, bool add) {
  for (; i + kRows <= rows; i += kRows)
    for (int64_t j = 0; j < columns; j += kSliver)
      tile<Arithmetic, kRows>(a + i * stride, stride, b + j * words, words, c + i * c_row + j, c_row,
                              smaller(kSliver, columns - j), add);
  return i;
}

template <class T>
inline const T* at(const Operand& x, int64_t i, int64_t j) {
  return static_cast<const T*>(x.data) + i * x.row + j * x.column;
}

// Rows of C from i0 to i1, columns from j0 to j1.
template <class Arithmetic>
void block(const Matmul& args, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  constexpr int64_t per = Arithmetic::kPerWord;
  constexpr Dtype kNative = per == 1 ? Dtype::kFloat32 : Dtype::kBFloat16;
  const int64_t all_words = (args.k + per - 1) / per;
  const int64_t blocks = (all_words > 0 ? (all_words + kDepth - 1) / kDepth : 1);
  const int64_t depth = (all_words + blocks - 1) / blocks;
  const Operand &a = args.a, &b = args.b;
  const bool in_place = a.dtype == kNative && a.column == 1 && a.row % per == 0 && args.k % per == 0;
  const int64_t slivers = (smaller(kPanel, j1 - j0) + kSliver - 1) / kSliver;
  const Words packed_b(slivers * kSliver * depth);
  const Words packed_a(in_place ? 0 : (i1 - i0) * depth);
  if (all_words == 0 && !args.accumulate)
    for (int64_t i = i0; i < i1; ++i) fill(args.c + i * args.c_row + j0, j1 - j0);
  for (int64_t w0 = 0; w0 < all_words; w0 += depth) {
    const int64_t words = smaller(depth, all_words - w0), k0 = w0 * per, left = args.k - k0;
    const uint32_t* rows = packed_a.data;
    int64_t stride = words;
    if (in_place) {
      rows = static_cast<const uint32_t*>(a.data) + (i0 * a.row + k0) / per;
      stride = a.row / per;
    } else {
      with_type(a.dtype, [&](auto type) {
        pack<Arithmetic>(at<decltype(type)>(a, i0, k0), a.row, a.column, i1 - i0, words, left, packed_a.data,
                         words, 1);
      });
    }
    for (int64_t j = j0; j < j1; j += kPanel) {
      const int64_t columns = smaller(kPanel, j1 - j);
      with_type(b.dtype, [&](auto type) {
        pack_slivers<Arithmetic>(at<decltype(type)>(b, k0, j), b.row, b.column, columns, words, left,
                                 packed_b.data);
      });
      const float* panel = reinterpret_cast<const float*>(packed_b.data);
      float* c = args.c + i0 * args.c_row + j;
      const bool add = args.accumulate || w0 > 0;
      int64_t i =
          tiles<Arithmetic, kTileRows>(0, rows, stride, i1 - i0, panel, columns, words, c, args.c_row, add);
      i = tiles<Arithmetic, 3>(i, rows, stride, i1 - i0, panel, columns, words, c, args.c_row, add);
      tiles<Arithmetic, 1>(i, rows, stride, i1 - i0, panel, columns, words, c, args.c_row, add);
    }
  }
}

}  // namespace

// Tasks [begin, end), counted along the rows first.
void matmul(const Matmul& args, int64_t begin, int64_t end) {
  const int64_t tall = (args.m + kMatmulRows - 1) / kMatmulRows;
  for (int64_t task = begin; task < end; ++task) {
    const int64_t i = task % tall * kMatmulRows, j = task / tall * args.task_columns;
    const int64_t i1 = smaller(i + kMatmulRows, args.m), j1 = smaller(j + args.task_columns, args.n);
#ifdef __AVX512BF16__
    if (args.pairs) {
      block<Pairs>(args, i, i1, j, j1);
      continue;
    }
#endif
    block<Floats>(args, i, i1, j, j1);
  }
}

}  // namespace RK_ISA
}  // namespace rk
