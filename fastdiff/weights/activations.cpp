// Activations to uint8 in two passes over memory: minimum and maximum, then scale, round and (for convolutions) pad.
// Weights to int8, a row at a time.
//
// Compiled where it runs, in a second, as it needs none of PyTorch's headers. Threads are OpenMP's, from the library that
// PyTorch has loaded: a second pool would spin beside the first one.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

using bfloat16 = uint16_t;
// Numbers below which threads cost more than they save.
constexpr int64_t kSerial = 1 << 15;
constexpr float kLevels = 254.0f;

inline float widen(bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
inline float widen(float value) { return value; }

struct Range {
  float low, high;
  int32_t not_finite;
};

// Not inlined, so that the compiler keeps what __restrict tells it.
template <typename T>
__attribute__((noinline)) Range range_of(const T* __restrict x, int64_t count) {
  float low = 0.0f, high = 0.0f;
  int32_t not_finite = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(| : not_finite)
  for (int64_t i = 0; i < count; ++i) {
    const float value = widen(x[i]);
    low = value < low ? value : low;
    high = value > high ? value : high;
    not_finite |= !(std::fabs(value) <= 3.4028235e38f);
  }
  return {low, high, not_finite};
}

template <typename T>
__attribute__((noinline)) void round_all(const T* __restrict x, uint8_t* __restrict out, int64_t count, float inverse,
                                         float zero_point) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    // Never below 0 or above 255: see the zero point.
    out[i] = static_cast<uint8_t>(static_cast<int32_t>(nearbyintf(widen(x[i]) * inverse + zero_point)));
  }
}

// Where this thread's part begins, or the next one's.
inline int64_t first(int64_t count, int next = 0) {
  const int64_t part = omp_get_thread_num() + next, parts = omp_get_num_threads();
  return part == parts ? count : count * part / parts;
}

template <typename T>
void quantize(const T* x, uint8_t* out, int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t pad_h,
              int64_t pad_w, float* scale_and_zero_point) {
  const int64_t count = batch * height * width * channels;
  float low = 0.0f, high = 0.0f;
  int32_t not_finite = 0;
#pragma omp parallel if (count > kSerial) reduction(min : low) reduction(max : high) reduction(| : not_finite)
  {
    const int64_t begin = first(count), end = first(count, 1);
    const Range part = range_of(x + begin, end - begin);
    low = part.low;
    high = part.high;
    not_finite = part.not_finite;
  }
  const float scale = std::max(high / kLevels - low / kLevels, 1e-30f);
  const float inverse = 1.0f / scale;
  // Rounded so that the lowest number comes to -0.49 or more, and the highest, with a level to spare, to 254.51 or less.
  const float zero_point = std::floor(-low * inverse + 0.51f);
  // What is not finite makes the scale, and so the output, not finite.
  scale_and_zero_point[0] = not_finite ? NAN : scale;
  scale_and_zero_point[1] = not_finite ? 0.0f : zero_point;
  if (not_finite) {
    std::memset(out, 0, batch * (height + 2 * pad_h) * (width + 2 * pad_w) * channels);
    return;
  }
  const auto fill = static_cast<int>(zero_point);
  if (pad_h == 0 && pad_w == 0) {
#pragma omp parallel if (count > kSerial)
    {
      const int64_t begin = first(count), end = first(count, 1);
      round_all(x + begin, out + begin, end - begin, inverse, zero_point);
    }
    return;
  }
  const int64_t rows = height + 2 * pad_h, row = (width + 2 * pad_w) * channels;
#pragma omp parallel for if (count > kSerial) schedule(static)
  for (int64_t i = 0; i < batch * rows; ++i) {
    const int64_t y = i % rows - pad_h;
    uint8_t* to = out + i * row;
    if (y < 0 || y >= height) {
      std::memset(to, fill, row);
      continue;
    }
    std::memset(to, fill, pad_w * channels);
    std::memset(to + row - pad_w * channels, fill, pad_w * channels);
    const T* from = x + (i / rows * height + y) * width * channels;
    round_all(from, to + pad_w * channels, width * channels, inverse, zero_point);
  }
}

template <typename T>
__attribute__((noinline)) void quantize_row(const T* __restrict x, int8_t* __restrict out, int64_t count, float scale) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<int8_t>(static_cast<int32_t>(nearbyintf(widen(x[i]) / scale)));
}

// The largest |sum| of two neighbouring channels, numbers 0 and 1, 2 and 3 and so on, of (outer, channels, inner) numbers.
template <typename T>
__attribute__((noinline)) float largest_pair(const T* __restrict x, int64_t outer, int64_t channels, int64_t inner) {
  float largest = 0.0f;
  for (int64_t i = 0; i < outer; ++i) {
    for (int64_t pair = 0; pair < channels / 2; ++pair) {
      const T* first = x + (i * channels + 2 * pair) * inner;
#pragma omp simd reduction(max : largest)
      for (int64_t j = 0; j < inner; ++j) {
        const float sum = std::fabs(widen(first[j]) + widen(first[inner + j]));
        largest = sum > largest ? sum : largest;
      }
    }
  }
  return largest;
}

template <typename T>
void quantize_rows(const T* x, int8_t* out, float* scales, int64_t rows, int64_t count, int64_t channels,
                   int64_t inner) {
#pragma omp parallel for if (rows * count > kSerial) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const Range range = range_of(x + row * count, count);
    float largest = std::max(std::max(range.high, -range.low), 1e-30f);
    if (channels > 0) {
      largest = std::max(largest, largest_pair(x + row * count, count / (channels * inner), channels, inner));
    }
    const float scale = largest / 127.0f;
    scales[row] = range.not_finite ? NAN : scale;
    if (range.not_finite) {
      std::memset(out + row * count, 0, count);
    } else {
      quantize_row(x + row * count, out + row * count, count, scale);
    }
  }
}

}  // namespace

extern "C" {

void fastdiff_quantize_rows_bfloat16(const void* x, int8_t* out, float* scales, int64_t rows, int64_t count,
                                     int64_t channels, int64_t inner) {
  quantize_rows(static_cast<const bfloat16*>(x), out, scales, rows, count, channels, inner);
}

void fastdiff_quantize_rows_float32(const void* x, int8_t* out, float* scales, int64_t rows, int64_t count,
                                    int64_t channels, int64_t inner) {
  quantize_rows(static_cast<const float*>(x), out, scales, rows, count, channels, inner);
}

void fastdiff_quantize_bfloat16(const void* x, uint8_t* out, int64_t batch, int64_t height, int64_t width,
                                int64_t channels, int64_t pad_h, int64_t pad_w, float* scale_and_zero_point) {
  quantize(static_cast<const bfloat16*>(x), out, batch, height, width, channels, pad_h, pad_w, scale_and_zero_point);
}

void fastdiff_quantize_float32(const void* x, uint8_t* out, int64_t batch, int64_t height, int64_t width,
                               int64_t channels, int64_t pad_h, int64_t pad_w, float* scale_and_zero_point) {
  quantize(static_cast<const float*>(x), out, batch, height, width, channels, pad_h, pad_w, scale_and_zero_point);
}
}
