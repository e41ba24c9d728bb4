// Tensors of any float dtype and row stride, read and written as floats a chunk at a time: a kernel over
// several tensors needs no copy of itself for every combination of their dtypes. Chunks are counted along the
// flattened tensor, so what a chunk holds depends neither on the layout nor on the threads.
#pragma once

#include "math.h"

namespace rk {
namespace RK_ISA {
namespace {

constexpr int kChunk = 1024;  // elements: a kernel's few buffers of 4 KiB stay in the first-level cache

struct alignas(kBytes) Buffer {
  float data[kChunk];
};

struct alignas(kBytes) MaskBuffer {
  uint8_t data[kChunk];
};

// Elements of chunk `index` of a tensor of `size`.
inline int chunk_length(int64_t size, int64_t index) {
  const int64_t rest = size - index * kChunk;
  return static_cast<int>(rest < kChunk ? rest : kChunk);
}

inline int whole_vectors(int count) { return (count + kLanes - 1) / kLanes * kLanes; }

template <class T>
inline void widen(const T* from, int count, float* to) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i == count) return;
  T lanes[kLanes] = {};
  memcpy(lanes, from + i, (count - i) * sizeof(T));
  const vf x = load(lanes);
  memcpy(to + i, &x, (count - i) * sizeof(float));
}

inline void widen(const float* from, int count, float* to) { memcpy(to, from, count * sizeof(float)); }

inline void widen(const uint8_t* from, int count, uint8_t* to) { memcpy(to, from, count); }

// Elements [begin, begin + count) into `to`, padded with 0 to whole vectors.
template <class T, class To>
inline void gather(const T* data, int64_t columns, int64_t stride, int64_t begin, int count, To* to) {
  int64_t row = begin / columns, column = begin % columns;
  for (int done = 0; done < count; ++row, column = 0) {
    const int64_t left = columns - column;
    const int piece = left < count - done ? static_cast<int>(left) : count - done;
    widen(data + row * stride + column, piece, to + done);
    done += piece;
  }
  for (int i = count; i < whole_vectors(count); ++i) to[i] = 0;
}

// Where chunk [begin, begin + count) lies if it is whole vectors in one piece, else null.
template <class T>
inline const T* in_place(const void* data, int64_t columns, int64_t stride, int64_t begin, int count) {
  const int64_t row = begin / columns, column = begin % columns;
  const bool fits = count % kLanes == 0 && column + count <= columns;
  return fits ? static_cast<const T*>(data) + row * stride + column : nullptr;
}

// Elements [begin, begin + count), count <= kChunk, followed by 0 up to whole vectors:
// in place or in `buffer`.
inline const float* read(const Flat& x, int64_t begin, int count, Buffer& buffer) {
  switch (x.dtype) {
    case Dtype::kFloat32:
      if (const float* there = in_place<float>(x.data, x.columns, x.stride, begin, count)) return there;
      gather(static_cast<const float*>(x.data), x.columns, x.stride, begin, count, buffer.data);
      break;
    case Dtype::kFloat16:
      gather(static_cast<const Half*>(x.data), x.columns, x.stride, begin, count, buffer.data);
      break;
    case Dtype::kBFloat16:
      gather(static_cast<const BFloat*>(x.data), x.columns, x.stride, begin, count, buffer.data);
      break;
  }
  return buffer.data;
}

// Likewise the mask, 0 in what was added; an absent one reads as 1.
inline const uint8_t* read(const FlatMask& mask, int64_t begin, int count, MaskBuffer& buffer) {
  if (!mask.data) {
    memset(buffer.data, 1, count);
    memset(buffer.data + count, 0, whole_vectors(count) - count);
    return buffer.data;
  }
  if (const uint8_t* there = in_place<uint8_t>(mask.data, mask.columns, mask.stride, begin, count))
    return there;
  gather(mask.data, mask.columns, mask.stride, begin, count, buffer.data);
  return buffer.data;
}

// All bits set in the lanes that count.
inline vi counted(const uint8_t* mask) { return load_bytes(mask) != 0; }

template <class T>
inline void narrow(const float* from, int count, T* to) {
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  if (i == count) return;
  T lanes[kLanes];
  store(lanes, load(from + i));
  memcpy(to + i, lanes, (count - i) * sizeof(T));
}

inline void narrow(const float* from, int count, float* to) { memcpy(to, from, count * sizeof(float)); }

// Elements [begin, begin + count) of a contiguous tensor to be written: fill `floats` in whole vectors,
// then flush().
class Sink {
 public:
  float* floats;

  Sink(void* data, Dtype dtype, int64_t begin, int count, Buffer& buffer)
      : data_(data), dtype_(dtype), begin_(begin), count_(count) {
    const bool direct = data && dtype == Dtype::kFloat32 && count % kLanes == 0;
    floats = direct ? static_cast<float*>(data) + begin : buffer.data;
    flushed_ = direct;
  }

  void flush() const {
    if (flushed_) return;
    with_type(dtype_,
              [&](auto type) { narrow(floats, count_, static_cast<decltype(type)*>(data_) + begin_); });
  }

 private:
  void* data_;
  Dtype dtype_;
  int64_t begin_;
  int count_;
  bool flushed_;
};

}  // namespace
}  // namespace RK_ISA
}  // namespace rk
