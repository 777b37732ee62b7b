// Scaled dot-product attention of bfloat16, heads of 64 channels, for CPUs whose vectors multiply bfloat16.
//
// A tile of rows of queries at a time meets all keys: its scores stay in the cache, so that no softmax has to be
// corrected. Keys and values are first put in pairs, as the instruction takes them, once a head and thread.
// Exports nothing where the processor lacks the instruction.
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace {

using bfloat16 = uint16_t;
constexpr int64_t kDim = 64, kPairs = kDim / 2, kLanes = 16, kVectors = kDim / kLanes;
// What fits in the registers, times four, so that keys come from the second cache a quarter as often.
constexpr int64_t kRows = 6, kTile = 4 * kRows;
// Below as many products threads cost more than they save.
constexpr int64_t kSerial = 1 << 14;
constexpr float kLog2e = 1.44269504f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

inline __m512bh pairs_at(const bfloat16* from) { return (__m512bh)_mm512_loadu_si512(from); }

inline __m512bh broadcast(const bfloat16* pair) {
  int32_t bits;
  std::memcpy(&bits, pair, sizeof bits);
  return (__m512bh)_mm512_set1_epi32(bits);
}

inline void store(bfloat16* to, __m512 values) { _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh(values)); }

// 2^x to six digits: a polynomial over the part after the point, from -1/2 to 1/2.
inline __m512 exp2_of(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 part = _mm512_sub_ps(x, whole);
  __m512 sum = _mm512_set1_ps(1.3398874e-3f);
  for (const float coefficient : {9.6184373e-3f, 5.5503324e-2f, 2.4022648e-1f, 6.9314720e-1f, 1.0f})
    sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(coefficient));
  return _mm512_scalef_ps(sum, whole);
}

// To [key / 16][pair of channels][16 keys][2]: blocks of 16 rows by 16 pairs, transposed.
void pack_keys(const bfloat16* keys, int64_t stride, int64_t count, int64_t padded, bfloat16* out) {
  alignas(64) const bfloat16 zeros[kDim] = {};
  for (int64_t block = 0; block < padded; block += kLanes) {
    const bfloat16* rows[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane)
      rows[lane] = block + lane < count ? keys + (block + lane) * stride : zeros;
    for (int64_t part = 0; part < kDim; part += 2 * kLanes) {
      __m512i r[16], t[16];
      for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows[i] + part);
      for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
      }
      for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
      }
      for (int i = 0; i < 4; ++i) {
        const __m512i a = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), b = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        const __m512i c = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd), d = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
        bfloat16* column = out + block * kDim + (part / 2 + i) * 2 * kLanes;
        _mm512_storeu_si512(column, _mm512_shuffle_i32x4(a, b, 0x88));
        _mm512_storeu_si512(column + 8 * kLanes, _mm512_shuffle_i32x4(c, d, 0x88));
        _mm512_storeu_si512(column + 16 * kLanes, _mm512_shuffle_i32x4(a, b, 0xdd));
        _mm512_storeu_si512(column + 24 * kLanes, _mm512_shuffle_i32x4(c, d, 0xdd));
      }
    }
  }
}

// To [pair of keys][channel][2].
void pack_values(const bfloat16* values, int64_t stride, int64_t count, int64_t padded, bfloat16* out) {
  const auto row = [&](int64_t key, int64_t channel) {
    const __m256i found = _mm256_loadu_si256((const __m256i*)(values + std::min(key, count - 1) * stride + channel));
    return _mm512_cvtepu16_epi32(key < count ? found : _mm256_setzero_si256());
  };
  for (int64_t key = 0; key < padded; key += 2)
    for (int64_t channel = 0; channel < kDim; channel += kLanes) {
      const __m512i pairs = _mm512_or_si512(row(key, channel), _mm512_slli_epi32(row(key + 1, channel), 16));
      _mm512_storeu_si512(out + key * kDim + 2 * channel, pairs);
    }
}

// Products of kRows rows with 16 * N keys.
template <int N>
inline void score(const bfloat16* const* rows, const bfloat16* keys, float* scores, int64_t padded) {
  __m512 sum[kRows][N];
  for (int r = 0; r < kRows; ++r)
    for (int n = 0; n < N; ++n) sum[r][n] = _mm512_setzero_ps();
  for (int64_t pair = 0; pair < kPairs; ++pair) {
    __m512bh column[N];
    for (int n = 0; n < N; ++n) column[n] = pairs_at(keys + (n * kPairs + pair) * 2 * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const __m512bh query = broadcast(rows[r] + 2 * pair);
      for (int n = 0; n < N; ++n) sum[r][n] = _mm512_dpbf16_ps(sum[r][n], query, column[n]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int n = 0; n < N; ++n) _mm512_storeu_ps(scores + r * padded + n * kLanes, sum[r][n]);
}

// The weights of one row, not yet divided by their sum, which is returned. `mask`, where there is one, is added.
inline float weigh(float* scores, const float* mask, int64_t padded, float scale, bfloat16* weights) {
  const __m512 factor = _mm512_set1_ps(scale);
  __m512 top = _mm512_set1_ps(-kInfinity), sum = _mm512_setzero_ps();
  for (int64_t key = 0; key < padded; key += kLanes) {
    __m512 x = _mm512_mul_ps(_mm512_loadu_ps(scores + key), factor);
    if (mask != nullptr) x = _mm512_add_ps(x, _mm512_loadu_ps(mask + key));
    _mm512_storeu_ps(scores + key, x);
    top = _mm512_max_ps(top, x);
  }
  const __m512 highest = _mm512_set1_ps(_mm512_reduce_max_ps(top));
  for (int64_t key = 0; key < padded; key += kLanes) {
    const __m512 weight = exp2_of(_mm512_sub_ps(_mm512_loadu_ps(scores + key), highest));
    sum = _mm512_add_ps(sum, weight);
    store(weights + key, weight);
  }
  return _mm512_reduce_add_ps(sum);
}

// The mean of the values by weight, for kRows rows, of which the first few are stored.
inline void mix(const bfloat16* weights, const float* sums, const bfloat16* values, int64_t padded, bfloat16* const* out,
                int64_t rows) {
  __m512 sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int n = 0; n < kVectors; ++n) sum[r][n] = _mm512_setzero_ps();
  for (int64_t key = 0; key < padded; key += 2) {
    __m512bh value[kVectors];
    for (int n = 0; n < kVectors; ++n) value[n] = pairs_at(values + key * kDim + n * 2 * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const __m512bh weight = broadcast(weights + r * padded + key);
      for (int n = 0; n < kVectors; ++n) sum[r][n] = _mm512_dpbf16_ps(sum[r][n], weight, value[n]);
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int n = 0; n < kVectors; ++n)
      store(out[r] + n * kLanes, _mm512_mul_ps(sum[r][n], _mm512_set1_ps(1.0f / sums[r])));
}

// What one thread works in.
struct Scratch {
  explicit Scratch(int64_t padded) {
    const int64_t bytes = padded * (2 * kDim * sizeof(bfloat16) + kTile * (sizeof(float) + sizeof(bfloat16)) + sizeof(float));
    memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    keys = static_cast<bfloat16*>(memory);
    values = keys + padded * kDim;
    scores = reinterpret_cast<float*>(values + padded * kDim);
    mask = scores + padded * kTile;
    weights = reinterpret_cast<bfloat16*>(mask + padded);
  }
  ~Scratch() { std::free(memory); }
  void* memory;
  bfloat16 *keys, *values, *weights;
  float *scores, *mask;
};

}  // namespace

// Strides, in numbers: batch, head and token of queries, keys, values and result; channels lie side by side. `mask` is
// null, or has a number for each key that is added to its scores. Returns 0, or 1 if there is no memory to work in.
extern "C" int32_t fastdiff_attention(const bfloat16* query, const bfloat16* key, const bfloat16* value,
                                      const bfloat16* mask, bfloat16* out, int64_t batch, int64_t heads, int64_t queries,
                                      int64_t keys, const int64_t* strides, float scale) {
  const int64_t padded = (keys + kLanes - 1) / kLanes * kLanes, tiles = (queries + kTile - 1) / kTile;
  const int64_t tasks = batch * heads * tiles;
  int32_t failed = 0;
#pragma omp parallel if (batch * heads * queries * keys > kSerial) reduction(| : failed)
  {
    const int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();
    const Scratch scratch(padded);
    failed = scratch.memory == nullptr;
    const bool masked = mask != nullptr || padded > keys;
    for (int64_t i = 0; masked && !failed && i < padded; ++i) {
      const uint32_t bits = mask != nullptr && i < keys ? static_cast<uint32_t>(mask[i]) << 16 : 0;
      float added;
      std::memcpy(&added, &bits, sizeof added);
      scratch.mask[i] = i < keys ? added * kLog2e : -kInfinity;
    }
    int64_t packed = -1;
    for (int64_t task = tasks * part / parts; !failed && task < tasks * (part + 1) / parts; ++task) {
      const int64_t head = task / tiles, b = head / heads, h = head % heads, first = task % tiles * kTile;
      if (head != packed) {
        pack_keys(key + b * strides[3] + h * strides[4], strides[5], keys, padded, scratch.keys);
        pack_values(value + b * strides[6] + h * strides[7], strides[8], keys, padded, scratch.values);
        packed = head;
      }
      const int64_t rows = std::min(kTile, queries - first), used = (rows + kRows - 1) / kRows * kRows;
      const bfloat16* from[kTile];
      bfloat16* to[kTile];
      for (int64_t r = 0; r < used; ++r) {  // the last row again, where registers are left over
        const int64_t token = first + std::min(r, rows - 1);
        from[r] = query + b * strides[0] + h * strides[1] + token * strides[2];
        to[r] = out + b * strides[9] + h * strides[10] + token * strides[11];
      }
      int64_t at = 0;
      for (; at + 4 * kLanes <= padded; at += 4 * kLanes)
        for (int64_t r = 0; r < used; r += kRows)
          score<4>(from + r, scratch.keys + at * kDim, scratch.scores + r * padded + at, padded);
      for (; at < padded; at += kLanes)
        for (int64_t r = 0; r < used; r += kRows)
          score<1>(from + r, scratch.keys + at * kDim, scratch.scores + r * padded + at, padded);
      float sums[kTile];
      for (int64_t r = 0; r < used; ++r)
        sums[r] = weigh(scratch.scores + r * padded, masked ? scratch.mask : nullptr, padded, scale * kLog2e,
                        scratch.weights + r * padded);
      for (int64_t r = 0; r < used; r += kRows)
        mix(scratch.weights + r * padded, sums + r, scratch.values, padded, to + r, std::min(kRows, rows - r));
    }
  }
  return failed;
}
#endif
