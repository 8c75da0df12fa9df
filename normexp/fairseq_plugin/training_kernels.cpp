// Dropout with a counter-based generator, and the rows of the fused loss.
//
// Maxima and sums are kept per lane, which g++ turns into vector instructions.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

namespace {

inline float from_bf16(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// To the nearest, ties to even, as torch rounds; NaN stays NaN.
inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  return value == value ? static_cast<uint16_t>(rounded) : static_cast<uint16_t>(0x7FC0);
}

struct Bf16 {
  uint16_t bits;
};
inline float load(Bf16 x) { return from_bf16(x.bits); }
inline float load(float x) { return x; }
inline double load(double x) { return x; }
inline void store(Bf16& to, float x) { to.bits = to_bf16(x); }
inline void store(float& to, float x) { to = x; }
inline void store(double& to, double x) { to = x; }

// ---------------------------------------------------------------------------------------- dropout

constexpr int kLanes = 16;                        // generators that run side by side
constexpr int kDraws = 2 * kLanes;                // draws of 16 bits that one step of them gives
constexpr int kSteps = 32;
constexpr int64_t kSegment = kSteps * kDraws;     // elements that one seeding serves

using Words = uint32_t __attribute__((vector_size(kLanes * sizeof(uint32_t))));

inline Words rotated(Words x, int by) { return (x << by) | (x >> (32 - by)); }

// Philox4x32-10 (Salmon et al., SC'11) of the counters (first + lane, stream) under `key`.
inline void philox(uint64_t key, uint64_t stream, uint64_t first, uint32_t (*words)[kLanes]) {
  uint32_t *a = words[0], *b = words[1], *c = words[2], *d = words[3];
  for (int i = 0; i < kLanes; ++i) {
    uint64_t counter = first + i;
    a[i] = static_cast<uint32_t>(counter);
    b[i] = static_cast<uint32_t>(counter >> 32);
    c[i] = static_cast<uint32_t>(stream);
    d[i] = static_cast<uint32_t>(stream >> 32);
  }
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 1  // unrolled, g++ 12 does not vectorize it
    for (int i = 0; i < kLanes; ++i) {
      uint64_t p = static_cast<uint64_t>(a[i]) * 0xD2511F53u;
      uint64_t q = static_cast<uint64_t>(c[i]) * 0xCD9E8D57u;
      a[i] = static_cast<uint32_t>(q >> 32) ^ b[i] ^ k0;
      c[i] = static_cast<uint32_t>(p >> 32) ^ d[i] ^ k1;
      b[i] = static_cast<uint32_t>(q);
      d[i] = static_cast<uint32_t>(p);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// Sixteen xoshiro128++ (Blackman and Vigna, 2021), seeded by Philox for every segment of a tensor,
// so that the draw of an element depends on key, stream and its place, not on threads.
struct Generators {
  Words s0, s1, s2, s3;

  Generators(uint64_t key, uint64_t stream, int64_t segment) {
    alignas(64) uint32_t words[4][kLanes];
    philox(key, stream, static_cast<uint64_t>(segment) * kLanes, words);
    std::memcpy(&s0, words[0], sizeof s0);
    std::memcpy(&s1, words[1], sizeof s1);
    std::memcpy(&s2, words[2], sizeof s2);
    std::memcpy(&s3, words[3], sizeof s3);
  }

  void next(uint16_t* draws) {
    Words result = rotated(s0 + s3, 7) + s0;
    Words t = s1 << 9;
    s2 ^= s0;
    s3 ^= s1;
    s1 ^= s2;
    s0 ^= s3;
    s2 ^= t;
    s3 = rotated(s3, 11);
    std::memcpy(draws, &result, sizeof result);
  }
};

template <typename T, typename Math>
void drop(const T* x, T* y, int64_t size, uint16_t threshold, Math scale, uint64_t key,
          uint64_t stream) {
  int64_t segments = (size + kSegment - 1) / kSegment;
  at::parallel_for(0, segments, 16, [=](int64_t begin, int64_t end) {
    alignas(64) uint16_t draws[kDraws];
    for (int64_t segment = begin; segment < end; ++segment) {
      Generators generators(key, stream, segment);
      int64_t stop = std::min(size, (segment + 1) * kSegment);
      int64_t at = segment * kSegment;
      for (; at + kDraws <= stop; at += kDraws) {
        generators.next(draws);
        for (int i = 0; i < kDraws; ++i) {
          Math value = load(x[at + i]) * scale;
          store(y[at + i], draws[i] >= threshold ? value : Math(0));
        }
      }
      if (at < stop) generators.next(draws);
      for (int i = 0; at + i < stop; ++i) {
        store(y[at + i], draws[i] >= threshold ? load(x[at + i]) * scale : Math(0));
      }
    }
  });
}

// x times 0 or 1/(1-threshold/2^16); the draw of element i depends on key, stream and i alone.
at::Tensor dropout(const at::Tensor& x, int64_t threshold, int64_t key, int64_t stream) {
  TORCH_CHECK(x.is_cpu(), "dropout: x must be on the CPU");
  TORCH_CHECK(0 <= threshold && threshold < 65536, "dropout: threshold must be in [0, 65536)");
  at::Tensor in = x.contiguous();
  at::Tensor out = at::empty_like(in);
  double scale = 65536.0 / static_cast<double>(65536 - threshold);
  auto limit = static_cast<uint16_t>(threshold);
  auto k = static_cast<uint64_t>(key), s = static_cast<uint64_t>(stream);
  if (in.scalar_type() == at::kFloat) {
    drop<float, float>(in.data_ptr<float>(), out.data_ptr<float>(), in.numel(), limit, scale, k, s);
  } else if (in.scalar_type() == at::kBFloat16) {
    drop<Bf16, float>(static_cast<const Bf16*>(in.data_ptr()), static_cast<Bf16*>(out.data_ptr()),
                      in.numel(), limit, scale, k, s);
  } else {
    TORCH_CHECK(in.scalar_type() == at::kDouble, "dropout: float32, float64 or bfloat16 only");
    drop<double, double>(in.data_ptr<double>(), out.data_ptr<double>(), in.numel(), limit, scale, k,
                         s);
  }
  return out;
}

// ----------------------------------------------------------------------------------- fused loss

constexpr int kWide = 64;

// exp for x <= 0, relative error below 2e-7; 0 below -87. With explicit fused operations, because
// this file is compiled with reassociation, which would merge the two parts of ln 2.
inline float exp_nonpositive(float x) {
  float clamped = x < -87.0f ? -87.0f : x;
  float n = __builtin_floorf(clamped * 1.44269504f + 0.5f);
  float r = __builtin_fmaf(n, -0.693359375f, clamped);
  r = __builtin_fmaf(n, 2.12194440e-4f, r);
  float p = 1.98756915e-4f;
  p = __builtin_fmaf(p, r, 1.39819995e-3f);
  p = __builtin_fmaf(p, r, 8.33345190e-3f);
  p = __builtin_fmaf(p, r, 4.16657949e-2f);
  p = __builtin_fmaf(p, r, 1.66666672e-1f);
  p = __builtin_fmaf(p, r, 0.5f);
  p = __builtin_fmaf(p * r, r, r + 1.0f);
  uint32_t exponent = static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &exponent, sizeof power);
  float value = x < -87.0f ? 0.0f : p * power;
  return x == x ? value : x;
}

template <typename T>
float max_of(const T* row, int64_t size) {
  float best[kWide];
  std::fill(best, best + kWide, -INFINITY);
  int64_t i = 0;
  for (; i + kWide <= size; i += kWide) {
    for (int lane = 0; lane < kWide; ++lane) {
      float value = load(row[i + lane]);
      best[lane] = value > best[lane] ? value : best[lane];
    }
  }
  float found = *std::max_element(best, best + kWide);
  for (; i < size; ++i) found = std::max(found, load(row[i]));
  return found;
}

// Row by row: nll = logsumexp(logits) - logits[target]; then logits become softmax(logits) with
// `correct` subtracted at the target.
template <typename T>
void rows(T* logits, const int64_t* targets, float* nll, int64_t count, int64_t size,
          float correct, bool gradient) {
  at::parallel_for(0, count, 1, [=](int64_t begin, int64_t end) {
    std::unique_ptr<float[]> powers(new float[size]);
    for (int64_t r = begin; r < end; ++r) {
      T* row = logits + r * size;
      float top = max_of(row, size);
      float sums[kWide] = {};
      int64_t i = 0;
      for (; i + kWide <= size; i += kWide) {
        for (int lane = 0; lane < kWide; ++lane) {
          float power = exp_nonpositive(load(row[i + lane]) - top);
          powers[i + lane] = power;
          sums[lane] += power;
        }
      }
      double total = 0;
      for (float sum : sums) total += sum;
      for (; i < size; ++i) total += powers[i] = exp_nonpositive(load(row[i]) - top);
      nll[r] = top + static_cast<float>(std::log(total)) - load(row[targets[r]]);
      if (!gradient) continue;
      float inverse = static_cast<float>(1 / total);
      for (i = 0; i < size; ++i) store(row[i], powers[i] * inverse);
      store(row[targets[r]], powers[targets[r]] * inverse - correct);
    }
  });
}

at::Tensor loss_rows_(at::Tensor& logits, const at::Tensor& targets, double correct,
                      bool gradient) {
  TORCH_CHECK(logits.is_cpu() && logits.dim() == 2 && logits.is_contiguous(),
              "loss_rows_: logits must be contiguous (N, V) on the CPU");
  TORCH_CHECK(targets.is_contiguous() && targets.scalar_type() == at::kLong &&
                  targets.numel() == logits.size(0),
              "loss_rows_: targets must be N contiguous int64");
  int64_t count = logits.size(0), size = logits.size(1);
  const int64_t* target = targets.data_ptr<int64_t>();
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK(0 <= target[i] && target[i] < size, "loss_rows_: target out of range");
  }
  at::Tensor nll = at::empty({count}, logits.options().dtype(at::kFloat));
  auto c = static_cast<float>(correct);
  if (logits.scalar_type() == at::kFloat) {
    rows(logits.data_ptr<float>(), target, nll.data_ptr<float>(), count, size, c, gradient);
  } else {
    TORCH_CHECK(logits.scalar_type() == at::kBFloat16, "loss_rows_: float32 or bfloat16 only");
    rows(static_cast<Bf16*>(logits.data_ptr()), target, nll.data_ptr<float>(), count, size, c,
         gradient);
  }
  return nll;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(normexp, m) {
  m.def("dropout(Tensor x, int threshold, int key, int stream) -> Tensor", &dropout);
  m.def(
      "loss_rows_(Tensor(a!) logits, Tensor targets, float correct, bool gradient) -> Tensor",
      &loss_rows_);
}
