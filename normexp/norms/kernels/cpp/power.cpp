// PN (Algorithm 2) and PN-V: one step of training, forward and backward. Equations and rules of
// the state: normexp/norms/power.py, power_v.py (also the plain implementation), running_norm.py.
#include "rows.h"

namespace normexp {
namespace {

struct Options {
  double eps, alpha_fwd, alpha_bwd;
  int64_t warmup_steps;
  bool bound_nu;
};

// What a step changes; nu is absent in PN-V.
struct State {
  const Tensor& running;
  std::optional<Tensor> nu;
  const Tensor &step, &num_rejected;
};

// What a forward returns for its repetition, which passes `saved` again: psi2, gamma, exact, n.
struct Memory {
  Tensor sum_sq, saved;
};

// The backward of PN and PN-V.
template <class T>
struct Quadratic {
  using A = Accumulator<T>;
  static constexpr const char* name = "PowerNormBackward";

  Options options;
  Padding padding;
  Vectors<A> kept;  // inverse, gamma
  bool exact;       // psi2 is the batch's own: PN-V, or PN in its warm-up
  std::optional<Tensor> nu;
  Tensor num_rejected;

  variable_list backward(const Tensor& of_x, const Tensor& weight, variable_list gradients) {
    if (!nu && at::GradMode::is_enabled()) return differentiable(of_x, weight, gradients[0]);
    const Tensor gradient = dense(gradients[0], of_x), dx = allocate_like(of_x);
    const Rows<T> x(of_x);
    const Values<A> w(weight);
    const int64_t channels = x.channels;
    const A n = static_cast<A>(std::max<int64_t>(padding.num_tokens(), 1));
    const Vectors<A> work(5, channels);
    A *scale = work[0], *slope = work[1], *dw = work[2], *db = work[3], *lambda = work[4];
    const A *inverse = kept[0], *gamma = kept[1];
    Sums<A> sums(x.count, 2, channels);
    const auto prepare = [&](const A* correction) {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        scale[c] = w[c] * inverse[c];
        slope[c] = -correction[c] * inverse[c] * inverse[c];
      }
    };
    const auto finish = [&] {
      sums.total(0, dw);
      sums.total(1, db);
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        dw[c] *= inverse[c];
        lambda[c] = dw[c] * w[c] / n;
      }
    };
    const T* upstream = content<T>(gradient);
    T* to = writable<T>(dx);
    if (exact) {
      sum_products<false>(x, upstream, padding, nullptr, sums);
      finish();
      prepare(lambda);
      propagate<false, false>(x, upstream, padding, scale, slope, nullptr, nullptr, to, nullptr);
    } else {
      prepare(Values<A>(*nu).data());
      propagate<true, false>(x, upstream, padding, scale, slope, nullptr, nullptr, to, &sums);
      finish();
    }
    if (nu) {
      const double update_rate = 1 - options.alpha_bwd;
      advance(*nu, padding.num_tokens(), num_rejected, [&](int64_t c, auto before) {
        using B = decltype(before);
        B rate = static_cast<B>(update_rate);
        if (options.bound_nu) rate = std::min(rate, 1 / static_cast<B>(gamma[c]));
        return before * (1 - rate * gamma[c]) + rate * lambda[c];
      });
    }
    const auto type = weight.scalar_type();
    variable_list result{dx, make(dw, channels, type), make(db, channels, type)};
    return nu ? once_differentiable(std::move(result)) : result;
  }

 private:
  // PN-V's gradient in operations that autograd knows, for second derivatives.
  variable_list differentiable(const Tensor& x, const Tensor& weight, const Tensor& gradient) {
    if (!gradient.defined()) return variable_list(3);
    const Tensor token_mask = padding.token_mask(), zero = at::zeros({}, at::kFloat);
    const auto mask_padding = [&](const Tensor& values) {
      const Tensor rows = values.reshape({-1, weight.size(0)});
      return at::where(token_mask, rows, zero.to(rows.scalar_type()));
    };
    const Tensor tokens = mask_padding(x.to(scalar_type<A>()));
    const double n = static_cast<double>(std::max<int64_t>(padding.num_tokens(), 1));
    const Tensor inverse = at::rsqrt(tokens.square().sum(0) / n + options.eps);
    const Tensor y = tokens * inverse * weight;
    const Tensor upstream = mask_padding(gradient);
    auto result = torch::autograd::grad({y}, {x, weight}, {upstream.to(y.scalar_type())},
                                        /*retain_graph=*/true, /*create_graph=*/true);
    result.push_back(upstream.sum(0).to(weight.scalar_type()));
    return result;
  }
};

// x -> y of PN and PN-V; advances the state unless the forward repeats another one, which PN knows
// by what that one saved.
template <class T>
Tensor forward(const Tensor& of_x, const std::optional<Tensor>& mask, const Tensor& weight,
               const Tensor& bias, const State& state, const Options& options, bool is_replay,
               const std::optional<Tensor>& replayed, Memory* memory) {
  using A = Accumulator<T>;
  const Rows<T> x(of_x);
  Padding padding(of_x, mask);
  const int64_t channels = x.channels, n = padding.num_tokens();
  Tensor y = allocate_like(of_x);
  const Values<A> w(weight), b(bias), running(state.running);
  Vectors<A> kept(2, channels);
  const Vectors<A> work(2, channels);
  A *inverse = kept[0], *gamma = kept[1], *scale = work[0], *psi2_batch = work[1];
  bool exact = !state.nu || *content<int64_t>(state.step) < options.warmup_steps;
  const auto prepare = [&](const A* psi2) {
    const A eps = static_cast<A>(options.eps);
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      inverse[c] = 1 / std::sqrt(psi2[c] + eps);
      scale[c] = inverse[c] * w[c];
    }
  };
  T* to = writable<T>(y);
  if (replayed) {
    exact = unpack(*replayed, channels, psi2_batch, gamma, 2)[0] != 0;
    prepare(psi2_batch);
    scale_tokens<false, false>(x, padding, scale, b.data(), nullptr, to, nullptr);
  } else {
    Sums<A> sums(x.count, 1, channels);
    const auto finish = [&] {
      sums.total(0, psi2_batch);
      if (memory) memory->sum_sq = make(psi2_batch, channels, scalar_type<A>());
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        psi2_batch[c] /= static_cast<A>(std::max<int64_t>(n, 1));
      }
    };
    if (exact) {
      sum_squares(x, padding, sums);
      finish();
      prepare(psi2_batch);
      scale_tokens<false, false>(x, padding, scale, b.data(), nullptr, to, nullptr);
    } else {
      prepare(running.data());
      scale_tokens<true, false>(x, padding, scale, b.data(), nullptr, to, &sums);
      finish();
    }
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) gamma[c] = psi2_batch[c] * inverse[c] * inverse[c];
    if (memory) {
      const A* psi2 = exact ? psi2_batch : running.data();
      memory->saved = pack(psi2, gamma, channels, {double(exact), double(n)});
    }
  }
  if (!is_replay &&
      is_usable(n, all_finite(psi2_batch, channels, state.running), state.num_rejected)) {
    average(state.running, psi2_batch, 1 - options.alpha_fwd);
    count_step(state.step);
  }
  record(of_x, weight, bias, {&y},
         Quadratic<T>{options, std::move(padding), std::move(kept), exact, state.nu,
                      state.num_rejected});
  return y;
}

Tensor dispatch(const Tensor& x, const std::optional<Tensor>& mask, const Tensor& weight,
                const Tensor& bias, const State& state, const Options& options, bool is_replay,
                const std::optional<Tensor>& replayed, Memory* memory) {
  check(x, {&weight, &bias, &state.running, state.nu ? &*state.nu : &state.running},
        {&state.step, &state.num_rejected});
  return by_type(x, [&](auto* null) {
    return forward<std::remove_pointer_t<decltype(null)>>(x, mask, weight, bias, state, options,
                                                          is_replay, replayed, memory);
  });
}

// One iteration of PN. Returns y; the sums of x^2 (C,), by which a forward that repeats this one is
// recognised; and what this one saved, which the repeated one passes as `replayed`.
std::tuple<Tensor, Tensor, Tensor> power(
    const Tensor& x, const std::optional<Tensor>& mask, const Tensor& weight, const Tensor& bias,
    const Tensor& running_psi2, const Tensor& nu, const Tensor& step, const Tensor& num_rejected,
    const std::optional<Tensor>& replayed, double eps, double alpha_fwd, double alpha_bwd,
    int64_t warmup_steps, bool bound_nu) {
  Memory memory;
  const Tensor y = dispatch(x, mask, weight, bias, {running_psi2, nu, step, num_rejected},
                            {eps, alpha_fwd, alpha_bwd, warmup_steps, bound_nu},
                            replayed.has_value(), replayed, &memory);
  if (replayed) memory = {at::empty({0}), *replayed};
  return {y, memory.sum_sq, memory.saved};
}

// The same for a forward that is not repeated and repeats none. Returns y.
Tensor power_once(const Tensor& x, const std::optional<Tensor>& mask, const Tensor& weight,
                  const Tensor& bias, const Tensor& running_psi2, const Tensor& nu,
                  const Tensor& step, const Tensor& num_rejected, double eps, double alpha_fwd,
                  double alpha_bwd, int64_t warmup_steps, bool bound_nu) {
  return dispatch(x, mask, weight, bias, {running_psi2, nu, step, num_rejected},
                  {eps, alpha_fwd, alpha_bwd, warmup_steps, bound_nu}, false, std::nullopt,
                  nullptr);
}

// One step of PN-V. Returns y.
Tensor power_v(const Tensor& x, const std::optional<Tensor>& mask, const Tensor& weight,
               const Tensor& bias, const Tensor& running_psi2, const Tensor& step,
               const Tensor& num_rejected, bool is_replay, double eps, double alpha) {
  return dispatch(x, mask, weight, bias, {running_psi2, std::nullopt, step, num_rejected},
                  {eps, alpha, 0, 0, false}, is_replay, std::nullopt, nullptr);
}

TORCH_LIBRARY_FRAGMENT(normexp, library) {
  library.def(
      "power(Tensor x, Tensor? mask, Tensor weight, Tensor bias, Tensor(a!) running_psi2, "
      "Tensor(b!) nu, Tensor(c!) step, Tensor(d!) num_rejected, Tensor? replayed, float eps, "
      "float alpha_fwd, float alpha_bwd, int warmup_steps, bool bound_nu) -> "
      "(Tensor, Tensor, Tensor)",
      power);
  library.def(
      "power_once(Tensor x, Tensor? mask, Tensor weight, Tensor bias, Tensor(a!) running_psi2, "
      "Tensor(b!) nu, Tensor(c!) step, Tensor(d!) num_rejected, float eps, float alpha_fwd, "
      "float alpha_bwd, int warmup_steps, bool bound_nu) -> Tensor",
      power_once);
  library.def(
      "power_v(Tensor x, Tensor? mask, Tensor weight, Tensor bias, Tensor(a!) running_psi2, "
      "Tensor(b!) step, Tensor(c!) num_rejected, bool is_replay, float eps, float alpha) -> Tensor",
      power_v);
}

}  // namespace
}  // namespace normexp
