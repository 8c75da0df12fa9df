// Masked BN, also regularized BN: one step of training, forward and backward. Equations and rules
// of the state: normexp/norms/batch.py (also the plain implementation), regularized_batch.py,
// running_norm.py.
#include "rows.h"

namespace normexp {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Options {
  double eps, momentum;
  bool regularized;  // 1 / sqrt(max(var, eps)), and running_var takes the biased variance
  bool is_replay;        // this forward repeats an earlier one and must not change the state
};

struct ForBackward {
  std::optional<Tensor> mask;
  Vector mean, var;
  double n;
  Options options;
};

// The factor of x - mean, from a variance.
double inverse_std(double var, const Options& options) {
  return 1 / std::sqrt(options.regularized ? std::max(var, options.eps) : var + options.eps);
}

// Derivative of inverse_std.
double inverse_std_slope(double var, const Options& options) {
  if (options.regularized && var < options.eps) return 0;
  return -0.5 * std::pow(inverse_std(var, options), 3);
}

// Mean of the real tokens and sum of their squared distances from it, with their number. Each
// block by itself in two passes, then combined (Chan, Golub, LeVeque 1979): a difference of sums
// of squares would lose its digits where the mean is large.
class Moments {
 public:
  Moments(int64_t rows, int64_t channels)
      : channels_(channels), threads_(num_threads(rows)), of_thread_(threads_) {
    for (auto& one : of_thread_) one = {0, Vector(channels), Vector(channels)};
  }

  // Adds the tokens of x.
  template <class T>
  void add(const Tensor& x, const Padding& padding) {
    using A = Accumulator<T>;
    const T* from = content<T>(x);
    const auto token = [&](int64_t row) { return !padding(row); };
    over_blocks(num_rows(x), [&](int thread, int64_t first, int64_t last) {
      std::vector<A> sums(2 * channels_);
      A *mean = sums.data(), *m2 = mean + channels_;
      const int64_t count = in_groups(first, last, token, [&](auto at_once, const int64_t* rows) {
        constexpr int kRows = decltype(at_once)::value;
        const T* in[kRows];
        for (int r = 0; r < kRows; ++r) in[r] = from + rows[r] * channels_;
#pragma omp simd
        for (int64_t c = 0; c < channels_; ++c) {
          A sum = 0;
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) sum += load(in[r][c]);
          mean[c] += sum;
        }
      });
      if (count == 0) return;
      for (int64_t c = 0; c < channels_; ++c) mean[c] /= static_cast<A>(count);
      in_groups(first, last, token, [&](auto at_once, const int64_t* rows) {
        constexpr int kRows = decltype(at_once)::value;
        const T* in[kRows];
        for (int r = 0; r < kRows; ++r) in[r] = from + rows[r] * channels_;
#pragma omp simd
        for (int64_t c = 0; c < channels_; ++c) {
          A sum = 0;
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            const A centered = load(in[r][c]) - mean[c];
            sum += centered * centered;
          }
          m2[c] += sum;
        }
      });
      of_thread_[thread].combine(static_cast<double>(count), mean, m2);
    });
  }

  // n, mean, variance (biased)
  std::tuple<double, Vector, Vector> result() const {
    Part all{0, Vector(channels_), Vector(channels_)};
    for (const Part& one : of_thread_) {
      if (one.n > 0) all.combine(one.n, one.mean.data(), one.m2.data());
    }
    for (double& value : all.m2) value /= std::max(all.n, 1.0);
    return {all.n, std::move(all.mean), std::move(all.m2)};
  }

 private:
  struct Part {
    double n;
    Vector mean, m2;

    // Adds `count` tokens with this mean and sum of squared distances.
    template <class A>
    void combine(double count, const A* other_mean, const A* other_m2) {
      const double share = count / (n + count);
      for (size_t c = 0; c < mean.size(); ++c) {
        const double apart = other_mean[c] - mean[c];
        mean[c] += share * apart;
        m2[c] += other_m2[c] + apart * apart * n * share;
      }
      n += count;
    }
  };

  int64_t channels_;
  int threads_;
  std::vector<Part> of_thread_;
};

// x -> y, mean, variance, n of BN, and the gradient; advances the state.
class Standardize : public torch::autograd::Function<Standardize> {
 public:
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                               const Tensor& bias, const std::optional<Tensor>& mask,
                               const Tensor& running_mean, const Tensor& running_var,
                               const Tensor& step, const Tensor& num_rejected,
                               const Options& options) {
    check(x, mask, {&weight, &bias, &running_mean, &running_var}, {&step, &num_rejected});
    const int64_t channels = x.size(-1), rows = num_rows(x);
    const Padding padding(x, mask);
    const Tensor y = at::empty_like(x);
    const Vector w = read(weight), b = read(bias);
    Vector mean, var, scale(channels);
    double n = 0;
    by_type(x, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      Moments moments(rows, channels);
      moments.add<T>(x, padding);
      std::tie(n, mean, var) = moments.result();
      for (int64_t c = 0; c < channels; ++c) scale[c] = inverse_std(var[c], options) * w[c];
      scale_tokens<T, false, true>(x, padding, scale, b, &mean, y, nullptr);
    });
    if (!options.is_replay && is_finite_batch(n, running_mean, num_rejected, {&mean, &var})) {
      Vector to_average = var;
      if (!options.regularized) {
        for (double& value : to_average) value *= n / std::max(n - 1, 1.0);
      }
      average(running_mean, mean, options.momentum);
      average(running_var, to_average, options.momentum);
      count_step(step);
    }
    ctx->save_for_backward({x, weight});
    const auto type = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const Tensor count = at::full({}, n, type);
    ctx->mark_non_differentiable({count});
    variable_list result{y, make(mean, type), make(var, type), count};
    keep(ctx, ForBackward{copy_of(mask), std::move(mean), std::move(var), n, options});
    return result;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const auto saved = ctx->get_saved_variables();
    const Tensor x = saved[0].contiguous(), weight = saved[1];  // hooks may have changed strides
    const ForBackward& of = kept<ForBackward>(ctx);
    if (at::GradMode::is_enabled()) {
      return differentiable(x, weight, of.mask, gradients, of.options);
    }
    const double n = std::max(of.n, 1.0);
    const Tensor gradient =
        gradients[0].defined() ? gradients[0].contiguous() : at::zeros_like(x);
    const int64_t channels = x.size(-1), rows = num_rows(x);
    Vector d_mean = gradients[1].defined() ? read(gradients[1]) : Vector(channels);
    const Vector d_var = gradients[2].defined() ? read(gradients[2]) : Vector(channels);
    const Padding padding(x, of.mask);
    const Tensor dx = at::empty_like(x);
    const Vector w = read(weight);
    Vector dw, db, scale(channels), slope(channels);
    by_type(x, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      Sums<Accumulator<T>> sums(rows, 2, channels);
      sum_products<T, true>(x, gradient, padding, &of.mean, sums);
      dw = sums.total(0, channels);
      db = sums.total(1, channels);
      for (int64_t c = 0; c < channels; ++c) {
        const double inverse = inverse_std(of.var[c], of.options);
        const double to_var =
            d_var[c] + dw[c] * w[c] * inverse_std_slope(of.var[c], of.options);
        scale[c] = w[c] * inverse;
        slope[c] = 2 * to_var / n;
        d_mean[c] = (d_mean[c] - db[c] * scale[c]) / n;
        dw[c] *= inverse;
      }
      propagate<T, false, true>(x, gradient, padding, scale, slope, &of.mean, &d_mean, dx,
                                nullptr);
    });
    const auto type = weight.scalar_type();
    variable_list result{dx, make(dw, type), make(db, type)};
    result.resize(9);
    return result;
  }

 private:
  // The same in operations that autograd knows, for second derivatives.
  static variable_list differentiable(const Tensor& x, const Tensor& weight,
                                      const std::optional<Tensor>& mask,
                                      const variable_list& gradients, const Options& options) {
    const Tensor tokens = x.scalar_type() == at::kDouble ? x : x.to(at::kFloat);
    const Tensor token_mask =
        mask ? mask->logical_not().t().unsqueeze(-1) : at::ones({}, x.options().dtype(at::kBool));
    const auto mask_padding = [&](const Tensor& values) {
      return at::where(token_mask, values, at::zeros({}, values.options()));
    };
    const Tensor n = (mask ? token_mask.sum() : at::full({}, num_rows(x))).clamp_min(1);
    const Tensor mean = mask_padding(tokens).flatten(0, -2).sum(0) / n;
    const Tensor centered = mask_padding(tokens - mean);
    const Tensor var = centered.square().flatten(0, -2).sum(0) / n;
    const Tensor inverse =
        at::rsqrt(options.regularized ? var.clamp_min(options.eps) : var + options.eps);
    const Tensor y = centered * (inverse * weight);
    variable_list outputs{y};
    variable_list upstream{gradients[0].defined() ? mask_padding(gradients[0]).to(y.dtype())
                                                  : at::zeros_like(y)};
    for (const auto& [output, gradient] : {std::pair(mean, gradients[1]), {var, gradients[2]}}) {
      if (!gradient.defined()) continue;
      outputs.push_back(output);
      upstream.push_back(gradient);
    }
    auto result = torch::autograd::grad(outputs, {x, weight}, upstream, /*retain_graph=*/true,
                                        /*create_graph=*/true);
    result.push_back(upstream[0].flatten(0, -2).sum(0).to(weight.scalar_type()));
    result.resize(9);
    return result;
  }
};

// One step of BN. Returns y, mean (C,), variance (C,), number of real tokens.
std::tuple<Tensor, Tensor, Tensor, Tensor> batch(
    const Tensor& x, const std::optional<Tensor>& mask, const Tensor& weight, const Tensor& bias,
    const Tensor& running_mean, const Tensor& running_var, const Tensor& step,
    const Tensor& num_rejected, bool is_replay, double eps, double momentum, bool regularized) {
  const Options options{eps, momentum, regularized, is_replay};
  const auto result = Standardize::apply(x, weight, bias, mask, running_mean, running_var, step,
                                         num_rejected, options);
  return {result[0], result[1], result[2], result[3]};
}

TORCH_LIBRARY_FRAGMENT(normexp, library) {
  library.def(
      "batch(Tensor x, Tensor? mask, Tensor weight, Tensor bias, Tensor(a!) running_mean, "
      "Tensor(b!) running_var, Tensor(c!) step, Tensor(d!) num_rejected, bool is_replay, "
      "float eps, float momentum, bool regularized) -> (Tensor, Tensor, Tensor, Tensor)",
      batch);
}

}  // namespace
}  // namespace normexp
