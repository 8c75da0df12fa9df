// RMSNorm, forward and backward. Equations: normexp/norms/rms.py, also the plain implementation.
#include "rows.h"

namespace normexp {
namespace {

// The backward of RMSNorm: with g = w dL/dy and x_hat = x r,
// dL/dx = r (g - x_hat mean_C(g x_hat)), dL/dw = sum of dL/dy x_hat.
template <class T>
struct Scaled {
  using A = Accumulator<T>;
  static constexpr const char* name = "RMSNormBackward";

  double eps;
  std::unique_ptr<A[]> r;  // (rows,)

  variable_list backward(const Tensor& of_x, const Tensor& weight, variable_list gradients) {
    if (at::GradMode::is_enabled()) return differentiable(of_x, weight, gradients[0]);
    const Tensor gradient = dense(gradients[0], of_x), dx = allocate_like(of_x);
    const Rows<T> x(of_x);
    const Values<A> w_values(weight);
    const A* w = w_values.data();
    const int64_t channels = x.channels;
    Sums<A> sums(x.count, 1, channels);
    const T* upstream = content<T>(gradient);
    T* to = writable<T>(dx);
    over_blocks(x.count, channels, [&](int thread, int64_t first, int64_t last) {
      A* products = sums.block(thread);
      in_groups(first, last, [](int64_t) { return true; }, [&](auto group) {
        constexpr int kRows = decltype(group)::size;
        const auto in = rows_at<const T, kRows>(x.values, group.rows, channels);
        const auto up = rows_at<const T, kRows>(upstream, group.rows, channels);
        const auto out = rows_at<T, kRows>(to, group.rows, channels);
        A factor[kRows], slope[kRows];
        const auto dots = sum_for_rows<kRows, A>(
            channels, [&](int i, int64_t c) { return load(up[i][c]) * w[c] * load(in[i][c]); });
        for (int i = 0; i < kRows; ++i) {
          factor[i] = r[group.rows[i]];
          slope[i] = dots[i] * factor[i] * factor[i] / static_cast<A>(channels);
        }
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
          A product = 0;
#pragma GCC unroll 4
          for (int i = 0; i < kRows; ++i) {
            const A g = load(up[i][c]), value = load(in[i][c]);
            product += g * (value * factor[i]);
            store(out[i][c], (g * w[c] - value * slope[i]) * factor[i]);
          }
          products[c] += product;
        }
      });
      sums.end_block(thread);
    });
    const Vectors<A> dw(1, channels);
    sums.total(0, dw[0]);
    return {dx, make(dw[0], channels, weight.scalar_type()), Tensor()};
  }

 private:
  // The same in operations that autograd knows, for second derivatives.
  variable_list differentiable(const Tensor& x, const Tensor& weight, const Tensor& gradient) {
    if (!gradient.defined()) return variable_list(3);
    const Tensor tokens = x.to(scalar_type<A>());
    const Tensor y = tokens * at::rsqrt(tokens.square().mean(-1, true) + eps) * weight;
    auto result = torch::autograd::grad({y}, {x, weight}, {gradient.to(y.scalar_type())},
                                        /*retain_graph=*/true, /*create_graph=*/true);
    result.emplace_back();
    return result;
  }
};

template <class T>
Tensor forward(const Tensor& of_x, const Tensor& weight, double eps) {
  using A = Accumulator<T>;
  const Rows<T> x(of_x);
  const Values<A> w_values(weight);
  const A* w = w_values.data();
  Tensor y = allocate_like(of_x);
  T* to = writable<T>(y);
  std::unique_ptr<A[]> r(new A[static_cast<size_t>(x.count)]);
  over_blocks(x.count, x.channels, [&](int, int64_t first, int64_t last) {
    in_groups(first, last, [](int64_t) { return true; }, [&](auto group) {
      constexpr int kRows = decltype(group)::size;
      const auto in = rows_at<const T, kRows>(x.values, group.rows, x.channels);
      const auto out = rows_at<T, kRows>(to, group.rows, x.channels);
      A factor[kRows];
      inverse_rms<kRows>(in.data(), x.channels, eps, factor);
      for (int i = 0; i < kRows; ++i) r[group.rows[i]] = factor[i];
#pragma omp simd
      for (int64_t c = 0; c < x.channels; ++c) {
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) store(out[i][c], load(in[i][c]) * factor[i] * w[c]);
      }
    });
  });
  record(of_x, weight, Tensor(), {&y}, Scaled<T>{eps, std::move(r)});
  return y;
}

// RMSNorm of x (T, B, C) or (N, C), contiguous; of the mask only the shape is checked. Returns y.
Tensor rms(const Tensor& x, const std::optional<Tensor>& mask, const Tensor& weight, double eps) {
  check(x, {&weight}, {});
  if (mask) check_mask(x, *mask);
  return by_type(x, [&](auto* null) {
    return forward<std::remove_pointer_t<decltype(null)>>(x, weight, eps);
  });
}

TORCH_LIBRARY_FRAGMENT(normexp, library) {
  library.def("rms(Tensor x, Tensor? mask, Tensor weight, float eps) -> Tensor", rms);
}

}  // namespace
}  // namespace normexp
