// PN (Algorithm 2) and PN-V: one step of training, forward and backward. Equations and rules of
// the state: normexp/norms/power.py, power_v.py (also the plain implementation), running_norm.py.
#include "rows.h"

namespace normexp {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

struct Options {
  double eps, alpha_fwd, alpha_bwd;
  int64_t warmup_steps;
  bool bound_nu;
  bool is_replay;  // this forward repeats an earlier one and must not change the state
};

// What a forward returns besides y, and what its repetition gets.
struct Saved {
  Vector sum_sq, psi2, gamma;
  bool exact;  // psi2 is the batch's own: PN-V, or PN in its warm-up
  double n;
};

struct ForBackward {
  std::optional<Tensor> mask, nu;
  Tensor num_rejected;
  Vector inverse, gamma;
  bool exact;
  double n;
  Options options;
};

// x -> y of PN and PN-V, and the gradient; advances the state. nu is absent in PN-V.
class Quadratic : public torch::autograd::Function<Quadratic> {
 public:
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const Tensor& bias, const std::optional<Tensor>& mask,
                        const Tensor& running, const std::optional<Tensor>& nu,
                        const Tensor& step, const Tensor& num_rejected, const Options& options,
                        Saved* saved) {
    check(x, mask, {&weight, &bias, &running, nu ? &*nu : &running}, {&step, &num_rejected});
    const int64_t channels = x.size(-1), rows = num_rows(x);
    const Padding padding(x, mask);
    const Tensor y = at::empty_like(x);
    const bool replayed = options.is_replay && nu;  // PN-V reads nothing of the state
    const bool exact = replayed ? saved->exact
                                : !nu || *step.const_data_ptr<int64_t>() < options.warmup_steps;
    const Vector w = read(weight), b = read(bias), before = read(running);
    Vector psi2 = replayed ? saved->psi2 : before;
    Vector psi2_batch, scale(channels), inverse(channels);
    const auto prepare = [&] {
      for (int64_t c = 0; c < channels; ++c) {
        inverse[c] = 1 / std::sqrt(psi2[c] + options.eps);
        scale[c] = inverse[c] * w[c];
      }
    };
    double n = 0;
    by_type(x, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      Sums<Accumulator<T>> sums(rows, 1, channels);
      const auto finish = [&] {
        saved->sum_sq = psi2_batch = sums.total(0, channels);
        n = sums.count();
        for (double& value : psi2_batch) value /= std::max(n, 1.0);
      };
      if (replayed) {
        prepare();
        scale_tokens<T, false, false>(x, padding, scale, b, nullptr, y, nullptr);
      } else if (exact) {
        sum_squares<T>(x, padding, sums);
        finish();
        psi2 = psi2_batch;
        prepare();
        scale_tokens<T, false, false>(x, padding, scale, b, nullptr, y, nullptr);
      } else {
        prepare();
        scale_tokens<T, true, false>(x, padding, scale, b, nullptr, y, &sums);
        finish();
      }
    });
    if (!replayed) {
      saved->gamma.resize(channels);
      for (int64_t c = 0; c < channels; ++c) {
        saved->gamma[c] = psi2_batch[c] * inverse[c] * inverse[c];
      }
      saved->psi2 = std::move(psi2);
      saved->exact = exact;
      saved->n = n;
    }
    if (!options.is_replay && is_finite_batch(n, running, num_rejected, {&psi2_batch})) {
      average(running, psi2_batch, 1 - options.alpha_fwd);
      count_step(step);
    }
    ctx->save_for_backward({x, weight});
    keep(ctx, ForBackward{copy_of(mask), nu, num_rejected, std::move(inverse), saved->gamma, exact,
                          saved->n, options});
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    const auto saved = ctx->get_saved_variables();
    const Tensor x = saved[0].contiguous(), weight = saved[1];  // hooks may have changed strides
    const ForBackward& of = kept<ForBackward>(ctx);
    if (!of.nu && at::GradMode::is_enabled()) {
      return differentiable(x, weight, of.mask, gradients[0], of.options.eps);
    }
    const Tensor gradient = gradients[0].contiguous();
    const int64_t channels = x.size(-1), rows = num_rows(x);
    const Padding padding(x, of.mask);
    const Tensor dx = at::empty_like(x);
    const Vector w = read(weight);
    Vector dw, db, lambda(channels), scale(channels), slope(channels);
    const auto prepare = [&](const Vector& correction) {
      for (int64_t c = 0; c < channels; ++c) {
        scale[c] = w[c] * of.inverse[c];
        slope[c] = -correction[c] * of.inverse[c] * of.inverse[c];
      }
    };
    by_type(x, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      Sums<Accumulator<T>> sums(rows, 2, channels);
      const auto finish = [&] {
        dw = sums.total(0, channels);
        db = sums.total(1, channels);
        for (int64_t c = 0; c < channels; ++c) {
          dw[c] *= of.inverse[c];
          lambda[c] = dw[c] * w[c] / std::max(of.n, 1.0);
        }
      };
      if (of.exact) {
        sum_products<T, false>(x, gradient, padding, nullptr, sums);
        finish();
        prepare(lambda);
        propagate<T, false, false>(x, gradient, padding, scale, slope, nullptr, nullptr, dx,
                                   nullptr);
      } else {
        prepare(read(*of.nu));
        propagate<T, true, false>(x, gradient, padding, scale, slope, nullptr, nullptr, dx, &sums);
        finish();
      }
    });
    if (of.nu) {
      Vector next = read(*of.nu);
      for (int64_t c = 0; c < channels; ++c) {
        double update_rate = 1 - of.options.alpha_bwd;
        if (of.options.bound_nu) update_rate = std::min(update_rate, 1 / of.gamma[c]);
        next[c] = next[c] * (1 - update_rate * of.gamma[c]) + update_rate * lambda[c];
      }
      if (is_finite_batch(of.n, *of.nu, of.num_rejected, {&next})) overwrite(*of.nu, next);
    }
    const auto type = weight.scalar_type();
    variable_list result{dx, make(dw, type), make(db, type)};
    if (of.nu) result = once_differentiable(std::move(result));
    result.resize(10);
    return result;
  }

 private:
  // Sums of x^2 over the real tokens.
  template <class T>
  static void sum_squares(const Tensor& x, const Padding& padding, Sums<Accumulator<T>>& sums) {
    using A = Accumulator<T>;
    const int64_t channels = x.size(-1);
    const T* from = content<T>(x);
    over_blocks(num_rows(x), [&](int thread, int64_t first, int64_t last) {
      A* sum_sq = sums.block(thread);
      const auto token = [&](int64_t row) { return !padding(row); };
      const int64_t count = in_groups(first, last, token, [&](auto at_once, const int64_t* rows) {
        constexpr int kRows = decltype(at_once)::value;
        const T* in[kRows];
        for (int r = 0; r < kRows; ++r) in[r] = from + rows[r] * channels;
#pragma omp simd
        for (int64_t c = 0; c < channels; ++c) {
          A sum = 0;
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            const A value = load(in[r][c]);
            sum += value * value;
          }
          sum_sq[c] += sum;
        }
      });
      sums.end_block(thread, count);
    });
  }

  // PN-V's gradient in operations that autograd knows, for second derivatives.
  static variable_list differentiable(const Tensor& x, const Tensor& weight,
                                      const std::optional<Tensor>& mask, const Tensor& gradient,
                                      double eps) {
    const Tensor tokens = x.scalar_type() == at::kDouble ? x : x.to(at::kFloat);
    const Tensor token_mask =
        mask ? mask->logical_not().t().unsqueeze(-1) : at::ones({}, x.options().dtype(at::kBool));
    const auto mask_padding = [&](const Tensor& values) {
      return at::where(token_mask, values, at::zeros({}, values.options()));
    };
    const Tensor values = mask_padding(tokens).flatten(0, -2);
    const Tensor n = mask ? token_mask.sum().clamp_min(1) : at::full({}, values.size(0));
    const Tensor psi2 = values.square().sum(0) / n;
    const Tensor y = mask_padding(tokens) * at::rsqrt(psi2 + eps) * weight;
    const Tensor upstream = mask_padding(gradient);
    auto result = torch::autograd::grad({y}, {x, weight}, {upstream.to(y.scalar_type())},
                                        /*retain_graph=*/true, /*create_graph=*/true);
    result.push_back(upstream.flatten(0, -2).sum(0).to(weight.scalar_type()));
    result.resize(10);
    return result;
  }
};

// One iteration of PN. Returns y; the sums of x^2 (C,), by which a forward that repeats this one is
// recognised; and what this one saved, which the repeated one passes as `replayed`: psi2, gamma,
// exact, n.
std::tuple<Tensor, Tensor, Tensor> power(
    const Tensor& x, const std::optional<Tensor>& mask, const Tensor& weight, const Tensor& bias,
    const Tensor& running_psi2, const Tensor& nu, const Tensor& step, const Tensor& num_rejected,
    const std::optional<Tensor>& replayed, double eps, double alpha_fwd, double alpha_bwd,
    int64_t warmup_steps, bool bound_nu) {
  Saved saved{};
  if (replayed) {
    auto [psi2, gamma, exact, n] = unpack(*replayed, x.size(-1));
    saved = {{}, std::move(psi2), std::move(gamma), exact, n};
  }
  const Options options{eps, alpha_fwd, alpha_bwd, warmup_steps, bound_nu, replayed.has_value()};
  const Tensor y = Quadratic::apply(x, weight, bias, mask, running_psi2, std::optional<Tensor>(nu),
                                    step, num_rejected, options, &saved);
  const auto type = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return {y, make(saved.sum_sq, type), pack({saved.psi2, saved.gamma, saved.exact, saved.n})};
}

// One step of PN-V. Returns y.
Tensor power_v(const Tensor& x, const std::optional<Tensor>& mask, const Tensor& weight,
               const Tensor& bias, const Tensor& running_psi2, const Tensor& step,
               const Tensor& num_rejected, bool is_replay, double eps, double alpha) {
  Saved saved{};
  return Quadratic::apply(x, weight, bias, mask, running_psi2, std::optional<Tensor>(), step,
                          num_rejected, Options{eps, alpha, 0, 0, false, is_replay}, &saved);
}

TORCH_LIBRARY_FRAGMENT(normexp, library) {
  library.def(
      "power(Tensor x, Tensor? mask, Tensor weight, Tensor bias, Tensor(a!) running_psi2, "
      "Tensor(b!) nu, Tensor(c!) step, Tensor(d!) num_rejected, Tensor? replayed, float eps, "
      "float alpha_fwd, float alpha_bwd, int warmup_steps, bool bound_nu) -> "
      "(Tensor, Tensor, Tensor)",
      power);
  library.def(
      "power_v(Tensor x, Tensor? mask, Tensor weight, Tensor bias, Tensor(a!) running_psi2, "
      "Tensor(b!) step, Tensor(c!) num_rejected, bool is_replay, float eps, float alpha) -> Tensor",
      power_v);
}

}  // namespace
}  // namespace normexp
