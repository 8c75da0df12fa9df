// Draws of 16 bits for dropout, from a counter-based generator.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

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

// Which elements of one tensor dropout keeps: those whose draw is at least the threshold.
struct Mask {
  uint16_t threshold;  // 0: all, and nothing is drawn
  uint64_t key, stream;

  double scale() const { return 65536.0 / static_cast<double>(65536 - threshold); }
};

// Reads the mask of one tensor; cheap where elements are read in order, since it keeps a segment.
class MaskReader {
 public:
  explicit MaskReader(const Mask& mask) : mask_(mask) {}

  // factors[i] = 0 where element first + i is dropped, else the scale.
  template <typename T>
  void read(int64_t first, int64_t count, T* factors) {
    T scale = static_cast<T>(mask_.scale());
    if (mask_.threshold == 0) {
      std::fill(factors, factors + count, scale);
      return;
    }
    uint16_t threshold = mask_.threshold;
    while (count > 0) {
      int64_t segment = first / kSegment, at = first % kSegment;
      if (segment != segment_) draw(segment);
      int64_t here = std::min(count, kSegment - at);
      const uint16_t* draws = draws_ + at;
      for (int64_t i = 0; i < here; ++i) factors[i] = draws[i] >= threshold ? scale : T(0);
      factors += here;
      first += here;
      count -= here;
    }
  }

 private:
  void draw(int64_t segment) {
    Generators generators(mask_.key, mask_.stream, segment);
    for (int step = 0; step < kSteps; ++step) generators.next(draws_ + step * kDraws);
    segment_ = segment;
  }

  Mask mask_;
  int64_t segment_ = -1;
  alignas(64) uint16_t draws_[kSegment];
};

}  // namespace
