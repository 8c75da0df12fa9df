// UN: one step of training, forward and backward. Equations and rules of the state:
// normexp/norms/unified.py (also the plain implementation), running_norm.py.
#include "rows.h"

namespace normexp {
namespace {

struct Options {
  double eps, momentum;
  int64_t warmup_steps, steps_uncorrected;
  double most_correction;
  bool outlier_filtration;
};

// The windows are (M, C).
struct State {
  const Tensor &running, &e, &psi2_window, &lambda_window, &step, &num_rejected, &skipped;
};

// What a forward returns for its repetition, which passes `saved` again: V, r, direct, skip, slot.
struct Memory {
  Tensor sum_sq, saved;
};

// What a forward has decided.
struct Choice {
  bool direct;  // lambda itself corrects the gradient
  bool skip;    // the batch is an outlier
  int64_t slot;
};

// The backward of UN.
template <class T>
struct Unified {
  using A = Accumulator<T>;
  static constexpr const char* name = "UnifiedNormBackward";

  Options options;
  Choice choice;
  int64_t n;
  Vectors<A> kept;  // 1 / sqrt(V + eps), r
  Tensor e, lambda_window, num_rejected;

  variable_list backward(const Tensor& of_x, const Tensor& weight, variable_list gradients) {
    const Tensor gradient = dense(gradients[0], of_x), dx = allocate_like(of_x);
    const Rows<T> x(of_x);
    const Padding nothing(of_x, std::nullopt);  // all positions count here
    const Values<A> w(weight);
    const int64_t channels = x.channels;
    const Vectors<A> work(4, channels);
    A *scale = work[0], *slope = work[1], *dw = work[2], *db = work[3];
    const A *inverse = kept[0], *r = kept[1];
    Sums<A> sums(x.count, 2, channels);
    const T* upstream = content<T>(gradient);
    sum_products<false>(x, upstream, nothing, nullptr, sums);
    sums.total(0, dw);
    sums.total(1, db);
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) dw[c] *= r[c] * inverse[c];
    advance_e(w.data(), dw, x.count, [&](int64_t c, A correction) {
      scale[c] = r[c] * w[c] * inverse[c];
      slope[c] = -correction * inverse[c] * inverse[c];
    });
    propagate<false, false>(x, upstream, nothing, scale, slope, nullptr, nullptr, writable<T>(dx),
                            nullptr);
    const auto type = weight.scalar_type();
    return once_differentiable({dx, make(dw, channels, type), make(db, channels, type)});
  }

 private:
  // Advances e and its window; calls use(c, factor of x_hat in the gradient).
  template <class Use>
  void advance_e(const A* w, const A* dw, int64_t positions, const Use& use) {
    with_buffer(e, [&](auto* e_values) {
      using B = std::remove_pointer_t<decltype(e_values)>;
      const int64_t channels = e.numel(), size = lambda_window.size(0);
      const Vectors<B> next(2, channels);
      B *next_e = next[0], *next_slot = next[1];
      B* window = writable<B>(lambda_window);
      const B update_rate = static_cast<B>(1 - options.momentum);
      const B count = static_cast<B>(std::max<int64_t>(positions, 1));
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        const B lambda = static_cast<B>(dw[c]) * static_cast<B>(w[c]) / count;
        next_slot[c] = choice.skip ? e_values[c] : lambda;
        B smoothed = lambda;
        if (!choice.direct) {
          B sum = 0;
          for (int64_t m = 0; m < size; ++m) {
            sum += m == choice.slot ? next_slot[c] : window[m * channels + c];
          }
          smoothed = sum / static_cast<B>(size);
        }
        next_e[c] = lerp(e_values[c], smoothed, update_rate);
        use(c, n > 0 ? static_cast<A>(choice.skip ? smoothed : next_e[c]) : 0);
      }
      if (!is_usable(n, all_finite(next_e, channels, e), num_rejected)) return;
      std::copy_n(next_e, channels, e_values);
      std::copy_n(next_slot, channels, window + choice.slot * channels);
      count_version(e);
      count_version(lambda_window);
    });
  }
};

// Of a batch's mean squares (C,): its V and r, and what else the forward decides; advances the
// state.
template <class A>
Choice advance_psi2(const State& state, const Options& options, const A* psi2_batch, int64_t n,
                    A* v, A* r) {
  Choice choice;
  with_buffer(state.running, [&](auto* running) {
    using B = std::remove_pointer_t<decltype(running)>;
    const int64_t channels = state.running.numel(), size = state.psi2_window.size(0);
    const int64_t step = *content<int64_t>(state.step) + 1;
    const bool early = step <= size || step < options.warmup_steps;
    B* window = writable<B>(state.psi2_window);
    choice.slot = step % size;
    choice.skip = false;
    const auto at = [&](int64_t m, int64_t c) {
      return m == choice.slot ? static_cast<B>(psi2_batch[c]) : window[m * channels + c];
    };
    const Vectors<B> work(1, channels);
    B* geometric = work[0];
    if (!early) {
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) {
        B logs = 0;
        for (int64_t m = 0; m < size; ++m) logs += std::log(at(m, c));
        geometric[c] = std::exp(logs / static_cast<B>(size));
      }
    }
    if (!early && options.outlier_filtration) {
      const B count = static_cast<B>(size);
      for (int64_t c = 0; c < channels; ++c) {
        B arithmetic = 0, mean = 0, spread = 0;
        for (int64_t m = 0; m < size; ++m) {
          arithmetic += at(m, c) / count;
          mean += std::sqrt(window[m * channels + c]) / count;
        }
        for (int64_t m = 0; m < size; ++m) {
          const B apart = std::sqrt(window[m * channels + c]) - mean;
          spread += apart * apart / count;
        }
        choice.skip |= arithmetic - geometric[c] > count * spread;
      }
    }
    choice.direct = early || choice.skip;
    const bool corrected =
        step > std::max(options.steps_uncorrected, options.warmup_steps) && !choice.skip;
    const B eps = static_cast<B>(options.eps), most = static_cast<B>(options.most_correction);
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      v[c] = choice.direct ? psi2_batch[c] : static_cast<A>(geometric[c]);
      if (n == 0) v[c] = static_cast<A>(running[c]);
      r[c] = 1;
      if (corrected) {
        const B ratio = std::sqrt((static_cast<B>(v[c]) + eps) / (running[c] + eps));
        // A comparison with NaN is false, and so NaN stays.
        r[c] = static_cast<A>(ratio < 1 / most ? 1 / most : ratio > most ? most : ratio);
      }
    }
    if (!is_usable(n, all_finite(psi2_batch, channels, state.running), state.num_rejected)) return;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      window[choice.slot * channels + c] =
          choice.skip ? running[c] : static_cast<B>(psi2_batch[c]);
    }
    count_version(state.psi2_window);
    average(state.running, v, 1 - options.momentum);
    count_step(state.step);
    if (choice.skip) count_step(state.skipped);
  });
  return choice;
}

// x -> y of UN; advances the state unless the forward repeats another one, which it knows by what
// that one saved.
template <class T>
Tensor forward(const Tensor& of_x, const std::optional<Tensor>& mask, const Tensor& weight,
               const Tensor& bias, const State& state, const Options& options,
               const std::optional<Tensor>& replayed, Memory* memory) {
  using A = Accumulator<T>;
  const Rows<T> x(of_x);
  const Padding padding(of_x, mask), nothing(of_x, std::nullopt);
  const int64_t channels = x.channels, n = padding.num_tokens();
  Tensor y = allocate_like(of_x);
  const Values<A> w(weight), b(bias);
  Vectors<A> kept(2, channels);
  const Vectors<A> work(3, channels);
  A *inverse = kept[0], *r = kept[1], *v = work[0], *scale = work[1], *psi2_batch = work[2];
  Choice choice;
  if (replayed) {
    const double* numbers = unpack(*replayed, channels, v, r, 3);
    choice = {numbers[0] != 0, numbers[1] != 0, static_cast<int64_t>(numbers[2])};
  } else {
    Sums<A> sums(x.count, 1, channels);
    sum_squares(x, padding, sums);
    sums.total(0, psi2_batch);
    if (memory) memory->sum_sq = make(psi2_batch, channels, scalar_type<A>());
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      psi2_batch[c] /= static_cast<A>(std::max<int64_t>(n, 1));
    }
    choice = advance_psi2(state, options, psi2_batch, n, v, r);
    if (memory) {
      memory->saved = pack(v, r, channels,
                           {double(choice.direct), double(choice.skip), double(choice.slot)});
    }
  }
  const A eps = static_cast<A>(options.eps);
#pragma omp simd
  for (int64_t c = 0; c < channels; ++c) {
    inverse[c] = 1 / std::sqrt(v[c] + eps);
    scale[c] = inverse[c] * w[c];
  }
  scale_tokens<false, false>(x, nothing, scale, b.data(), nullptr, writable<T>(y), nullptr);
  record(of_x, weight, bias, {&y},
         Unified<T>{options, choice, n, std::move(kept), state.e, state.lambda_window,
                    state.num_rejected});
  return y;
}

Tensor dispatch(const Tensor& x, const std::optional<Tensor>& mask, const Tensor& weight,
                const Tensor& bias, const State& state, const Options& options,
                const std::optional<Tensor>& replayed, Memory* memory) {
  check(x, {&weight, &bias, &state.running, &state.e},
        {&state.step, &state.num_rejected, &state.skipped});
  for (const Tensor* window : {&state.psi2_window, &state.lambda_window}) {
    TORCH_CHECK_VALUE(window->device().is_cpu() && window->is_contiguous() && window->dim() == 2 &&
                          window->size(0) > 0 && window->size(1) == x.size(-1) &&
                          window->scalar_type() == state.running.scalar_type() &&
                          window->size(0) == state.psi2_window.size(0),
                      "the windows must be (M, C) on the CPU, of the type of the other buffers");
  }
  TORCH_CHECK_VALUE(state.e.scalar_type() == state.running.scalar_type(),
                    "buffers must have one type");
  return by_type(x, [&](auto* null) {
    return forward<std::remove_pointer_t<decltype(null)>>(x, mask, weight, bias, state, options,
                                                          replayed, memory);
  });
}

// One step of UN. Returns y; the sums of x^2 (C,), by which a forward that repeats this one is
// recognised; and what this one saved, which the repeated one passes as `replayed`.
std::tuple<Tensor, Tensor, Tensor> unified(
    const Tensor& x, const std::optional<Tensor>& mask, const Tensor& weight, const Tensor& bias,
    const Tensor& running_psi2, const Tensor& e, const Tensor& psi2_window,
    const Tensor& lambda_window, const Tensor& step, const Tensor& num_rejected,
    const Tensor& skipped, const std::optional<Tensor>& replayed, double eps, double momentum,
    int64_t warmup_steps, int64_t steps_uncorrected, double most_correction,
    bool outlier_filtration) {
  Memory memory;
  const Tensor y = dispatch(
      x, mask, weight, bias,
      {running_psi2, e, psi2_window, lambda_window, step, num_rejected, skipped},
      {eps, momentum, warmup_steps, steps_uncorrected, most_correction, outlier_filtration},
      replayed, &memory);
  if (replayed) memory = {at::empty({0}), *replayed};
  return {y, memory.sum_sq, memory.saved};
}

// The same for a forward that is not repeated and repeats none. Returns y.
Tensor unified_once(const Tensor& x, const std::optional<Tensor>& mask, const Tensor& weight,
                    const Tensor& bias, const Tensor& running_psi2, const Tensor& e,
                    const Tensor& psi2_window, const Tensor& lambda_window, const Tensor& step,
                    const Tensor& num_rejected, const Tensor& skipped, double eps,
                    double momentum, int64_t warmup_steps, int64_t steps_uncorrected,
                    double most_correction, bool outlier_filtration) {
  return dispatch(
      x, mask, weight, bias,
      {running_psi2, e, psi2_window, lambda_window, step, num_rejected, skipped},
      {eps, momentum, warmup_steps, steps_uncorrected, most_correction, outlier_filtration},
      std::nullopt, nullptr);
}

TORCH_LIBRARY_FRAGMENT(normexp, library) {
  library.def(
      "unified(Tensor x, Tensor? mask, Tensor weight, Tensor bias, Tensor(a!) running_psi2, "
      "Tensor(b!) e, Tensor(c!) psi2_window, Tensor(d!) lambda_window, Tensor(e!) step, "
      "Tensor(f!) num_rejected, Tensor(g!) skipped, Tensor? replayed, float eps, float momentum, "
      "int warmup_steps, int steps_uncorrected, float most_correction, bool outlier_filtration) "
      "-> (Tensor, Tensor, Tensor)",
      unified);
  library.def(
      "unified_once(Tensor x, Tensor? mask, Tensor weight, Tensor bias, Tensor(a!) running_psi2, "
      "Tensor(b!) e, Tensor(c!) psi2_window, Tensor(d!) lambda_window, Tensor(e!) step, "
      "Tensor(f!) num_rejected, Tensor(g!) skipped, float eps, float momentum, int warmup_steps, "
      "int steps_uncorrected, float most_correction, bool outlier_filtration) -> Tensor",
      unified_once);
}

}  // namespace
}  // namespace normexp
