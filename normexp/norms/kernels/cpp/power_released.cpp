// PN as released: one step of training, forward and backward. Equations and rules of the state:
// normexp/norms/power_released.py (also the plain implementation), running_norm.py.
#include "rows.h"

namespace normexp {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Options {
  int64_t groups;
  double eps, alpha_fwd, alpha_bwd;
  int64_t warmup_steps;
  bool is_replay;  // this forward repeats an earlier one and must not change the state
};

// What a forward returns besides y, and what its repetition gets.
struct Saved {
  Vector token_sum_sq, psi2, psi2_batch;
  double n;
  bool by_batch;  // psi2 is psi2_batch
};

struct ForBackward {
  Tensor r, e, num_rejected;  // r (rows, groups)
  Vector inverse, batch_inverse, sum_sq;  // sums of xg^2 over all positions
  double n;
  Options options;
};

// Calls body(at_once, rows) for all rows of a block, real tokens and padding apart, each with the
// sums of its kind: quantity 0 for real tokens, 1 for padding.
template <class A, class Body>
void by_kind(const Tensor& x, const Padding& padding, Sums<A>& sums, const Body& body) {
  const int64_t channels = x.size(-1);
  over_blocks(num_rows(x), [&](int thread, int64_t first, int64_t last) {
    A* block = sums.block(thread);
    const auto with = [&](A* sum_sq) {
      return [&body, sum_sq](auto at_once, const int64_t* rows) { body(at_once, rows, sum_sq); };
    };
    const int64_t count =
        in_groups(first, last, [&](int64_t row) { return !padding(row); }, with(block));
    in_groups(first, last, [&](int64_t row) { return padding(row); }, with(block + channels));
    sums.end_block(thread, count);
  });
}

// Sums of term(row, c) over c < size for each of kRows rows: four at once, because one after the
// other each addition would have to wait for the one before. The order of the additions is the
// compiler's choice here and nowhere else.
template <int kRows, class A, class Term>
std::array<A, kRows> sum_for_rows(int64_t size, const Term& term) {
  if constexpr (kRows == 4) {
    A s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t c = 0; c < size; ++c) {
      s0 += term(0, c);
      s1 += term(1, c);
      s2 += term(2, c);
      s3 += term(3, c);
    }
    return {s0, s1, s2, s3};
  } else {
    static_assert(kRows == 1);
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < size; ++c) sum += term(0, c);
    return {sum};
  }
}

// 1 / sqrt(mean of x^2 over a group + eps)
template <int kRows, class T>
void inverse_rms(const T* const* rows, int64_t size, double eps, Accumulator<T>* result) {
  using A = Accumulator<T>;
  const auto sums = sum_for_rows<kRows, A>(size, [&](int i, int64_t c) {
    const A value = load(rows[i][c]);
    return value * value;
  });
  for (int i = 0; i < kRows; ++i) {
    result[i] = 1 / std::sqrt(sums[i] / static_cast<A>(size) + static_cast<A>(eps));
  }
}

// x -> y of PN as released, and its gradient; advances the state.
class Released : public torch::autograd::Function<Released> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const Tensor& bias, const std::optional<Tensor>& mask,
                        const Tensor& running, const Tensor& e, const Tensor& step,
                        const Tensor& num_rejected, const Options& options, Saved* saved) {
    check(x, mask, {&weight, &bias, &running, &e}, {&step, &num_rejected});
    const int64_t channels = x.size(-1), rows = num_rows(x), groups = options.groups;
    const Padding padding(x, mask);
    const Tensor y = at::empty_like(x);
    const double s = static_cast<double>(*step.const_data_ptr<int64_t>() + 1);
    const bool by_batch =
        options.is_replay ? saved->by_batch : s <= static_cast<double>(options.warmup_steps);
    const Vector w = read(weight), b = read(bias), before = read(running);
    const auto inverse_of = [&](const Vector& psi2) {
      Vector inverse(psi2);
      for (double& value : inverse) value = 1 / std::sqrt(value + options.eps);
      return inverse;
    };
    Vector psi2_batch, psi2 = options.is_replay ? saved->psi2 : before, sum_sq;
    double n = 0;
    Tensor r;  // (rows, groups), of the type in which x is summed
    by_type(x, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      using A = Accumulator<T>;
      r = at::empty({rows, groups}, std::is_same_v<A, double> ? at::kDouble : at::kFloat);
      Sums<A> sums(rows, 2, channels);
      const auto finish = [&] {
        sum_sq = sums.total(0, channels);
        saved->token_sum_sq = psi2_batch = sum_sq;
        n = sums.count();
        for (double& value : psi2_batch) value /= std::max(n, 1.0);
        // Of no token there is no statistic, and the running one stands in for it.
        if (n == 0) psi2_batch = options.is_replay ? saved->psi2_batch : before;
        const Vector of_padding = sums.total(1, channels);
        for (int64_t c = 0; c < channels; ++c) sum_sq[c] += of_padding[c];
      };
      const auto scale = [&](auto with_statistics) {
        const Vector inverse = inverse_of(psi2);
        Vector scale(channels);
        for (int64_t c = 0; c < channels; ++c) scale[c] = inverse[c] * w[c];
        scale_groups<T, decltype(with_statistics)::value>(x, padding, groups, options.eps, scale,
                                                          b, y, r, sums);
      };
      if (by_batch) {
        sum_squares<T>(x, padding, groups, options.eps, r, sums);
        finish();
        psi2 = psi2_batch;
        scale(std::false_type{});
      } else {
        scale(std::true_type{});
        finish();
      }
    });
    if (options.is_replay) {
      psi2_batch = saved->psi2_batch;
      n = saved->n;
    } else if (is_finite_batch(n, running, num_rejected, {&psi2_batch})) {
      Vector next = before;
      for (int64_t c = 0; c < channels; ++c) {
        if (s < static_cast<double>(options.warmup_steps)) {
          next[c] = (next[c] * (s - 1) + psi2_batch[c]) / s;
        }
        next[c] = lerp(next[c], psi2_batch[c], 1 - options.alpha_fwd);
      }
      overwrite(running, next);
      count_step(step);
    }
    ctx->save_for_backward({x, weight});
    keep(ctx, ForBackward{r, e, num_rejected, inverse_of(psi2), inverse_of(psi2_batch),
                          std::move(sum_sq), n, options});
    saved->psi2 = std::move(psi2);
    saved->psi2_batch = std::move(psi2_batch);
    saved->n = n;
    saved->by_batch = by_batch;
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const auto saved = ctx->get_saved_variables();
    const Tensor x = saved[0].contiguous(), weight = saved[1];  // hooks may have changed strides
    const ForBackward& of = kept<ForBackward>(ctx);
    const Tensor gradient = gradients[0].contiguous(), dx = at::empty_like(x);
    const Vector w = read(weight);
    const int64_t channels = x.size(-1), rows = num_rows(x);
    Vector next = read(of.e), factor(next), scale(channels), slope(channels), dw, db;
    for (int64_t c = 0; c < channels; ++c) {
      factor[c] *= of.n > 0 ? 1 - of.options.alpha_bwd : 0;
      scale[c] = w[c] * of.batch_inverse[c];
      slope[c] = -factor[c] * of.inverse[c] * of.batch_inverse[c];
    }
    by_type(x, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      Sums<Accumulator<T>> sums(rows, 2, channels);
      propagate_groups<T>(x, gradient, of.r, scale, slope, dx, sums);
      dw = sums.total(0, channels);
      db = sums.total(1, channels);
    });
    for (int64_t c = 0; c < channels; ++c) {
      dw[c] *= of.inverse[c];
      const double x_hat_squares = of.sum_sq[c] * of.inverse[c] * of.inverse[c];
      next[c] += (dw[c] * w[c] - factor[c] * x_hat_squares) / std::max<double>(1, rows);
    }
    if (is_finite_batch(of.n, of.e, of.num_rejected, {&next})) overwrite(of.e, next);
    const auto type = weight.scalar_type();
    auto result = once_differentiable({dx, make(dw, type), make(db, type)});
    result.resize(10);
    return result;
  }

 private:
  // Sums of xg^2, xg = x r, real tokens and padding apart; writes r.
  template <class T>
  static void sum_squares(const Tensor& x, const Padding& padding, int64_t groups, double eps,
                          const Tensor& r, Sums<Accumulator<T>>& sums) {
    using A = Accumulator<T>;
    const int64_t channels = x.size(-1), size = channels / groups;
    const T* from = content<T>(x);
    A* inverse = writable<A>(r);
    by_kind(x, padding, sums, [&](auto at_once, const int64_t* rows, A* sum_sq) {
      constexpr int kRows = decltype(at_once)::value;
      for (int64_t group = 0; group < groups; ++group) {
        const T* in[kRows];
        A factor[kRows];
        for (int i = 0; i < kRows; ++i) in[i] = from + rows[i] * channels + group * size;
        inverse_rms<kRows>(in, size, eps, factor);
        for (int i = 0; i < kRows; ++i) inverse[rows[i] * groups + group] = factor[i];
        A* sums_of_group = sum_sq + group * size;
#pragma omp simd
        for (int64_t c = 0; c < size; ++c) {
          A sum = 0;
#pragma GCC unroll 4
          for (int i = 0; i < kRows; ++i) {
            const A value = load(in[i][c]) * factor[i];
            sum += value * value;
          }
          sums_of_group[c] += sum;
        }
      }
    });
  }

  // y = x r scale + shift at all positions. With kSum writes r and sums xg^2, else reads r.
  template <class T, bool kSum>
  static void scale_groups(const Tensor& x, const Padding& padding, int64_t groups, double eps,
                           const Vector& scale_of, const Vector& shift_of, const Tensor& y,
                           const Tensor& r, Sums<Accumulator<T>>& sums) {
    using A = Accumulator<T>;
    const int64_t channels = x.size(-1), size = channels / groups;
    const auto scale_values = as<A>(scale_of), shift_values = as<A>(shift_of);
    const T* from = content<T>(x);
    T* to = writable<T>(y);
    A* inverse = writable<A>(r);
    by_kind(x, padding, sums, [&](auto at_once, const int64_t* rows, A* sum_sq) {
      constexpr int kRows = decltype(at_once)::value;
      for (int64_t group = 0; group < groups; ++group) {
        const T* in[kRows];
        T* out[kRows];
        A factor[kRows];
        for (int i = 0; i < kRows; ++i) {
          in[i] = from + rows[i] * channels + group * size;
          out[i] = to + rows[i] * channels + group * size;
          if constexpr (!kSum) factor[i] = inverse[rows[i] * groups + group];
        }
        if constexpr (kSum) {
          inverse_rms<kRows>(in, size, eps, factor);
          for (int i = 0; i < kRows; ++i) inverse[rows[i] * groups + group] = factor[i];
        }
        const A* scale = scale_values.data() + group * size;
        const A* shift = shift_values.data() + group * size;
        A* sums_of_group = sum_sq + group * size;
#pragma omp simd
        for (int64_t c = 0; c < size; ++c) {
          A sum = 0;
#pragma GCC unroll 4
          for (int i = 0; i < kRows; ++i) {
            const A value = load(in[i][c]) * factor[i];
            if constexpr (kSum) sum += value * value;
            store(out[i][c], value * scale[c] + shift[c]);
          }
          if constexpr (kSum) sums_of_group[c] += sum;
        }
      }
    });
  }

  // With xg = x r and d = gradient scale + xg slope: dx = r (d - xg mean_group(d xg)), at padding
  // too. Sums: quantity 0 of gradient xg, 1 of gradient.
  template <class T>
  static void propagate_groups(const Tensor& x, const Tensor& gradient, const Tensor& r,
                               const Vector& scale_of, const Vector& slope_of, const Tensor& dx,
                               Sums<Accumulator<T>>& sums) {
    using A = Accumulator<T>;
    const int64_t channels = x.size(-1), groups = r.size(1), size = channels / groups;
    const auto scale_values = as<A>(scale_of), slope_values = as<A>(slope_of);
    const T *from = content<T>(x), *upstream = content<T>(gradient);
    const A* inverse = content<A>(r);
    T* to = writable<T>(dx);
    over_blocks(num_rows(x), [&](int thread, int64_t first, int64_t last) {
      A* block = sums.block(thread);
      const auto all = [](int64_t) { return true; };
      in_groups(first, last, all, [&](auto at_once, const int64_t* rows) {
        constexpr int kRows = decltype(at_once)::value;
        for (int64_t group = 0; group < groups; ++group) {
          const T *in[kRows], *up[kRows];
          T* out[kRows];
          A factor[kRows], mean[kRows];
          const A* scale = scale_values.data() + group * size;
          const A* slope = slope_values.data() + group * size;
          for (int i = 0; i < kRows; ++i) {
            const int64_t offset = rows[i] * channels + group * size;
            in[i] = from + offset;
            up[i] = upstream + offset;
            out[i] = to + offset;
            factor[i] = inverse[rows[i] * groups + group];
          }
          const auto dots = sum_for_rows<kRows, A>(size, [&](int i, int64_t c) {
            const A value = load(in[i][c]) * factor[i];
            return (load(up[i][c]) * scale[c] + value * slope[c]) * value;
          });
          for (int i = 0; i < kRows; ++i) mean[i] = dots[i] / static_cast<A>(size);
          A *products = block + group * size, *plain = products + channels;
#pragma omp simd
          for (int64_t c = 0; c < size; ++c) {
            A product = 0, sum = 0;
#pragma GCC unroll 4
            for (int i = 0; i < kRows; ++i) {
              const A g = load(up[i][c]), value = load(in[i][c]) * factor[i];
              product += g * value;
              sum += g;
              const A d = g * scale[c] + value * slope[c];
              store(out[i][c], (d - value * mean[i]) * factor[i]);
            }
            products[c] += product;
            plain[c] += sum;
          }
        }
      });
      sums.end_block(thread, last - first);
    });
  }
};

// One iteration of PN as released. Returns y; the sums of xg^2 (C,) over the real tokens, by which
// a forward that repeats this one is recognised; and what this one saved, which the repeated one
// passes as `replayed`: psi2, psi2_batch, by_batch, n.
std::tuple<Tensor, Tensor, Tensor> power_released(
    const Tensor& x, const std::optional<Tensor>& mask, const Tensor& weight, const Tensor& bias,
    const Tensor& running_psi2, const Tensor& e, const Tensor& step, const Tensor& num_rejected,
    const std::optional<Tensor>& replayed, int64_t groups, double eps, double alpha_fwd,
    double alpha_bwd, int64_t warmup_steps) {
  Saved saved{};
  if (replayed) {
    auto [psi2, psi2_batch, by_batch, n] = unpack(*replayed, x.size(-1));
    saved = {{}, std::move(psi2), std::move(psi2_batch), n, by_batch};
  }
  const Options options{groups, eps, alpha_fwd, alpha_bwd, warmup_steps, replayed.has_value()};
  const Tensor y = Released::apply(x, weight, bias, mask, running_psi2, e, step, num_rejected,
                                   options, &saved);
  const auto type = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return {y, make(saved.token_sum_sq, type),
          pack({saved.psi2, saved.psi2_batch, saved.by_batch, saved.n})};
}

TORCH_LIBRARY_FRAGMENT(normexp, library) {
  library.def(
      "power_released(Tensor x, Tensor? mask, Tensor weight, Tensor bias, "
      "Tensor(a!) running_psi2, Tensor(b!) e, Tensor(c!) step, Tensor(d!) num_rejected, "
      "Tensor? replayed, int groups, float eps, float alpha_fwd, float alpha_bwd, "
      "int warmup_steps) -> (Tensor, Tensor, Tensor)",
      power_released);
}

}  // namespace
}  // namespace normexp
