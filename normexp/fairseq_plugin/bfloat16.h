// bfloat16 of the kernels of this folder: read and written as float.
//
// c10's own conversions branch on NaN, which keeps loops over them from being vectorized.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

struct Bf16 {
  uint16_t bits;
};

// The float of the same value.
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

// An element of a tensor of any of the types, for computing and for keeping.
inline float load(Bf16 x) { return from_bf16(x.bits); }
inline float load(float x) { return x; }
inline double load(double x) { return x; }
inline void store(Bf16& to, float x) { to.bits = to_bf16(x); }
inline void store(float& to, float x) { to = x; }
inline void store(double& to, double x) { to = x; }

}  // namespace
