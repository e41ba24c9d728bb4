// sample_tokens: the first column at which the running sum of e = exp((x - m) / T) exceeds u times the total.
// One read of the row keeps the sum of each segment; the segment that u falls into is read again and walked.
// top-k and top-p are a threshold each, found digit by digit on keys that order as the logits do,
// without a sort.
#include "sampling.h"

#include "softmax.h"

namespace rk {
namespace RK_ISA {
namespace {

constexpr int kSegments = 256;  // of whole blocks, so that their sums fit the stack at any vocabulary
constexpr int kDigit = 11;      // bits: a histogram of doubles is 16 KB, a third of the first-level cache
constexpr int kBuckets = 1 << kDigit;
constexpr int kFew =
    4096;  // columns: up to here clearing the buckets costs more than a pass over the columns,
constexpr int kSmallDigit = 8;  // and more passes with fewer of them are faster

struct Segments {
  int64_t width;  // columns in each
  int count = 0;
  float m = -kInf;  // maximum of the row
  double mass[kSegments];

  explicit Segments(int64_t vocab) {
    const int64_t blocks = (vocab + kBlock - 1) / kBlock;
    width = (blocks + kSegments - 1) / kSegments * kBlock;
  }

  // NaN where the row holds a NaN or +inf, 0 where it holds nothing but -inf.
  double total() const {
    double total = 0;
    for (int i = 0; i < count; ++i) total += mass[i];
    return total;
  }
};

// The whole row, read once.
template <class T>
Segments sum_segments(const T* x, int64_t vocab, double temperature) {
  const Exp exp(temperature);
  Segments segments(vocab);
  float m[kSegments];  // what each segment's mass is relative to
  Block<T> blocks[2];
  Running row;
  blocks[0].open(x, vocab);
  blocks[0].read();
  for (int64_t start = 0, now = 0; start < vocab; start += kBlock, now = 1 - now) {
    Block<T>&block = blocks[now], &next = blocks[1 - now];
    next.open(x + start + kBlock, vocab - start - kBlock);
    raise_max(row, block.max(), temperature);
    add_block<T, false>(block, next, exp, row);
    if ((start + kBlock) % segments.width == 0 || start + kBlock >= vocab) {
      m[segments.count] = row.m;
      segments.mass[segments.count++] = row.s.total();
      row.s = {};
    }
  }
  segments.m = row.m;
  for (int i = 0; i < segments.count; ++i)
    if (m[i] != row.m) segments.mass[i] *= std::exp((static_cast<double>(m[i]) - row.m) / temperature);
  return segments;
}

// exp((x - m) / T), 0 for what is below `least`.
struct Weight {
  Exp exp;
  vf m, least;

  Weight(double temperature, float max, float threshold)
      : exp(temperature), m(splat(max)), least(splat(threshold)) {}

  vf operator()(vf x) const {
    vf fraction, scale;
    exp.split(exp.clamp(x - m), fraction, scale);
    return x >= least ? fraction * scale : vf{};
  }
};

struct One {
  vf operator()(vf) const { return vf{} + 1.0f; }
};

// Order-preserving: of two numbers the larger has the larger key, -inf the smallest that counts.
constexpr uint32_t kMinusInfKey = 0x007fffff;

inline vu key_of(vf x) {
  const vi bits = reinterpret_cast<vi>(x);
  return reinterpret_cast<vu>(bits ^ ((bits >> 31) | INT32_MIN));
}

inline float number_of(uint32_t key) {
  const uint32_t bits = key & 0x80000000u ? key ^ 0x80000000u : ~key;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// The digit of a key at hand: its bits above are decided, and equal `prefix` where the column matters.
struct Digit {
  uint32_t prefix;
  int shift, bits;
};

// Adds the weight of each column that matters to the bucket of its digit. Columns of even and odd place have
// a histogram each: two adds in a row to one bucket would wait for each other.
template <class T, class Weigh>
void histogram(const T* x, int64_t vocab, const Weigh& weigh, Digit digit, double (&amount)[kBuckets]) {
  alignas(kBytes) uint32_t keys[kBlock];
  alignas(kBytes) float weights[kBlock];
  double odd[kBuckets];
  const uint32_t last = (1u << digit.bits) - 1;
  memset(amount, 0, (last + 1) * sizeof(double));
  memset(odd, 0, (last + 1) * sizeof(double));
  const auto add = [&](double* to, uint64_t key, float weight) {
    if (key >> (digit.shift + digit.bits) == digit.prefix)
      to[(key >> digit.shift) & last] += static_cast<double>(weight);
  };
  Block<T> block;
  for (int64_t start = 0; start < vocab; start += kBlock) {
    block.open(x + start, vocab - start);
    block.read();
    for (int i = 0; i < block.size; i += kLanes) {
      const vf lanes = load(block.columns() + i);
      store(reinterpret_cast<float*>(keys + i), reinterpret_cast<vf>(key_of(lanes)));
      store(weights + i, weigh(lanes));
    }
    for (int i = 0; i < block.size; i += 2) {
      add(amount, keys[i], weights[i]);
      add(odd, keys[i + 1], weights[i + 1]);
    }
  }
  for (uint32_t i = 0; i <= last; ++i) amount[i] += odd[i];
}

// The bucket that takes the sum from the top to `target`, which is left with what the bucket must bring.
int reach(const double* amount, int buckets, double& target) {
  int found = -1;
  for (int i = buckets - 1; i >= 0; --i) {
    if (amount[i] == 0) continue;
    // Where rounding leaves all of them short of the target: the lowest that holds anything.
    if (found >= 0) target -= amount[found];
    found = i;
    if (amount[i] >= target) break;
  }
  return found;
}

// The largest logit such that the columns at or above it weigh `target` together; `target` is a share of what
// all columns weigh if kShare.
template <class T, bool kShare, class Weigh>
float threshold(const T* x, int64_t vocab, const Weigh& weigh, double target) {
  // 16-bit logits differ in the upper 19 bits of their floats at most.
  constexpr int kDecided = sizeof(T) == 2 ? 19 : 32;
  const int width = vocab < kFew ? kSmallDigit : kDigit;
  double amount[kBuckets];
  Digit digit = {0, 32, 0};
  while (digit.shift > 32 - kDecided) {
    digit.bits = digit.shift < width ? digit.shift : width;
    digit.shift -= digit.bits;
    histogram(x, vocab, weigh, digit, amount);
    if (kShare && digit.prefix == 0 && digit.shift + digit.bits == 32) {
      double total = 0;
      for (int i = 0; i < 1 << digit.bits; ++i) total += amount[i];
      target *= total;
    }
    digit.prefix = digit.prefix << digit.bits | static_cast<uint32_t>(reach(amount, 1 << digit.bits, target));
  }
  const uint32_t key = digit.prefix << digit.shift;
  return number_of(key < kMinusInfKey ? kMinusInfKey : key);
}

// The columns at or above a cut, where they are few enough: a threshold among them is one of the row.
struct Candidates {
  static constexpr int kMost = 1 << 16;  // 256 KB: half would not do for top-p 0.9 of a flat row of 256,000
  int count = 0;
  alignas(kBytes) float value[kMost];

  // False if they are too many.
  template <class T>
  bool gather(const T* x, int64_t vocab, float cut) {
    Block<T> block;
    count = 0;
    for (int64_t start = 0; start < vocab; start += kBlock) {
      block.open(x + start, vocab - start);
      block.read();
      if (!(block.max() >= cut)) continue;
      for (int i = 0; i < block.size; i += kStep) {
        const float* step = block.columns() + i;
        if (!(max_of_step(step) >= cut)) continue;
        if (count + kStep > kMost) return false;
        for (int j = 0; j < kStep; ++j) {
          value[count] = step[j];
          count += step[j] >= cut;
        }
      }
    }
    return true;
  }

  static float max_of_step(const float* x) {
    vf top = load(x);
    for (int u = 1; u < kUnroll; ++u) top = max_keep_second(load(x + u * kLanes), top);
    return max_lane<kLanes / 2>(top, std::make_index_sequence<kLanes>());
  }
};

// The k-th largest logit. The k-th largest of the maxima of groups of columns is no larger, and close: it
// leaves few candidates.
template <class T>
float kth_largest(const T* x, int64_t vocab, int64_t k) {
  constexpr int kGroups = 4096;
  const int64_t width = (vocab + kGroups * kStep - 1) / (kGroups * kStep) * kStep;
  const int64_t groups = (vocab + width - 1) / width;
  const double rank = static_cast<double>(k);
  if (k <= groups) {
    Candidates few;
    Block<T> block;
    for (int64_t i = 0; i < groups; ++i) few.value[i] = -kInf;
    for (int64_t start = 0; start < vocab; start += kBlock) {
      block.open(x + start, vocab - start);
      block.read();
      for (int i = 0; i < block.size; i += kStep) {
        float& top = few.value[(start + i) / width];
        const float here = Candidates::max_of_step(block.columns() + i);
        if (here > top) top = here;
      }
    }
    if (few.gather(x, vocab, threshold<float, false>(few.value, groups, One(), rank)))
      return threshold<float, false>(few.value, few.count, One(), rank);
  }
  return threshold<T, false>(x, vocab, One(), rank);
}

// The smallest logit of the nucleus: of the columns not below `least`,
// the largest that weigh `top_p` of them all.
template <class T>
float nucleus(const T* x, int64_t vocab, double top_p, double temperature, float m, float least,
              double total) {
  Candidates few;
  const Weight weight(temperature, m, least);
  if (least > -kInf) {
    if (few.gather(x, vocab, least)) return threshold<float, true>(few.value, few.count, weight, top_p);
  } else {
    // All columns that weigh less than (1 - p) / V of the total weigh less than 1 - p of it together, and so
    // are outside. A little less than that, because the sums are rounded.
    const double light = std::log(0.999 * (1 - top_p) * total / static_cast<double>(vocab));
    if (few.gather(x, vocab, static_cast<float>(m + temperature * light)))
      return threshold<float, false>(few.value, few.count, weight, top_p * total);
  }
  return threshold<T, true>(x, vocab, weight, top_p);
}

template <class T>
Segments sum_kept(const T* x, int64_t vocab, const Weight& weight, float m) {
  Segments segments(vocab);
  segments.m = m;
  Block<T> block;
  for (int64_t start = 0; start < vocab; start += segments.width) {
    const int64_t end = start + segments.width < vocab ? start + segments.width : vocab;
    LaneSums sum;
    for (int64_t column = start; column < end; column += kBlock) {
      block.open(x + column, end - column);
      block.read();
      vf e[kUnroll] = {};
      for (int i = 0; i < block.size; i += kStep)
        for (int u = 0; u < kUnroll; ++u) e[u] += weight(load(block.columns() + i + u * kLanes));
      sum.add(e);
    }
    segments.mass[segments.count++] = sum.total();
  }
  return segments;
}

// The first column of [start, end) at which the running sum exceeds `target`, the last one that has any
// weight where rounding leaves the sum below it.
template <class T>
int64_t walk(const T* x, int64_t start, int64_t end, const Weight& weight, double target) {
  alignas(kBytes) float e[kBlock];
  Block<T> block;
  int64_t last = start;
  double sum = 0;
  for (; start < end; start += kBlock) {
    block.open(x + start, end - start);
    block.read();
    for (int i = 0; i < block.size; i += kLanes) store(e + i, weight(load(block.columns() + i)));
    for (int i = 0; i < block.size; ++i) {
      const Slot<T> slot(i % kStep);
      const float part = e[i - i % kStep + slot.vector * kLanes + slot.lane];
      if (part == 0) continue;
      last = start + i;
      sum += static_cast<double>(part);
      if (sum > target) return last;
    }
  }
  return last;
}

template <class T>
int64_t choose(const T* x, int64_t vocab, const Segments& segments, const Weight& weight, double target) {
  int chosen = -1;
  double before = 0;
  for (int i = 0; i < segments.count; ++i) {
    if (segments.mass[i] == 0) continue;
    if (chosen >= 0) before += segments.mass[chosen];
    chosen = i;
    if (before + segments.mass[i] > target) break;
  }
  const int64_t start = chosen * segments.width;
  const int64_t end = start + segments.width < vocab ? start + segments.width : vocab;
  return walk(x, start, end, weight, target - before);
}

template <class T>
void sample_row(const SampleTokens& args, int64_t n) {
  const T* x = static_cast<const T*>(args.logits.data) + offset(args.logits, n);
  const int64_t vocab = args.vocab;
  const double temperature = args.row_temperature ? args.row_temperature[n] : args.temperature;
  Segments segments = sum_segments(x, vocab, temperature);
  double total = segments.total();
  if (!(total > 0)) {  // NaN, or only -inf
    args.tokens[n] = 0;
    args.logprobs[n] = NAN;
    return;
  }
  float least = -kInf;
  if (args.top_k) least = kth_largest(x, vocab, args.top_k);
  if (args.top_p < 1) least = nucleus(x, vocab, args.top_p, temperature, segments.m, least, total);
  const Weight weight(temperature, segments.m, least);
  if (least > -kInf) {
    segments = sum_kept(x, vocab, weight, segments.m);
    total = segments.total();
  }
  const int64_t token = choose(x, vocab, segments, weight, args.uniform[n] * total);
  args.tokens[n] = token;
  args.logprobs[n] = static_cast<float>((static_cast<double>(to_float(x[token])) - segments.m) / temperature -
                                        std::log(total));
}

template <class T>
void sample_rows(const SampleTokens& args, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    if (!args.mask || args.mask[n]) {
      sample_row<T>(args, n);
    } else {
      args.tokens[n] = 0;
      args.logprobs[n] = 0;
    }
  }
}

}  // namespace

void sample_tokens(const SampleTokens& args, int64_t begin, int64_t end) {
  with_type(args.dtype, [&](auto type) { sample_rows<decltype(type)>(args, begin, end); });
}

}  // namespace RK_ISA
}  // namespace rk
