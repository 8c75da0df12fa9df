// Dropout with a counter-based generator: the operator torch.ops.normexp.dropout of dropout.py.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "bfloat16.h"

namespace {

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

// y = x * scale where a draw of 16 bits is at least the threshold, else 0; segments in parallel.
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

}  // namespace

TORCH_LIBRARY_FRAGMENT(normexp, m) {
  m.def("dropout(Tensor x, int threshold, int key, int stream) -> Tensor", &dropout);
}
