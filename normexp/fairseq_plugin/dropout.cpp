// Dropout with a counter-based generator: the operator torch.ops.normexp.dropout of dropout.py.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>

#include "bfloat16.h"
#include "draws.h"

namespace {

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
