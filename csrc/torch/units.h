// The operators fused_preact::preact_units_forward and preact_units_backward: residual units one
// after the other in one call, layer by layer through the operators of operators.h or composed.h.
// fused_preact/units.py has the same passes for any backend, and says what the arguments mean.
#pragma once

#include "composed.h"

namespace preact {

using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<OptionalTensor>;
using Flags = std::vector<bool>;

template <typename T>
void check_count(const char* name, const std::vector<T>& values, size_t expected) {
  check(values.size() == expected, name, ": expected ", expected, ", got ", values.size());
}

inline bool any(const Flags& flags, size_t begin, size_t end) {
  for (size_t i = begin; i < end; ++i)
    if (flags[i]) return true;
  return false;
}

inline Tensor nothing(const Tensor& like) {
  return torch::stable::empty({0}, like.scalar_type(), std::nullopt, like.device());
}

inline Tensors or_nothing(const OptionalTensors& tensors, const Tensor& like) {
  Tensors result;
  result.reserve(tensors.size());
  for (const OptionalTensor& tensor : tensors) result.push_back(tensor ? *tensor : nothing(like));
  return result;
}

struct Geometry {
  Sizes stride, padding, dilation;
  int64_t groups;
};

// Where a unit's layers are in the lists.
struct UnitLayers {
  size_t first, end;  // of its convolutions, and past the last
  size_t shift;       // among the geometries, by the projections of the units before
};

// The units of a call, and all that both passes know of them.
struct Units {
  static constexpr size_t kGeometry = 9;  // integers of a convolution
  const Tensors& weights;
  const OptionalTensors& projections;
  const Sizes& geometries;
  const std::vector<std::string>& shortcuts;
  const std::string& activation;
  const bool allow_tf32;
  const Flags& composed_convs;
  std::vector<UnitLayers> units;

  Units(const Tensors& weights, const OptionalTensors& projections, const Sizes& depths,
        const Sizes& geometries, const std::vector<std::string>& shortcuts,
        const std::string& activation, bool allow_tf32, const Flags& composed)
      : weights(weights),
        projections(projections),
        geometries(geometries),
        shortcuts(shortcuts),
        activation(activation),
        allow_tf32(allow_tf32),
        composed_convs(composed) {
    check_count("projections", projections, depths.size());
    check_count("shortcuts", shortcuts, depths.size());
    size_t first = 0, shift = 0;
    for (size_t j = 0; j < depths.size(); ++j) {
      check(depths[j] > 0, "depths: expected at least 1, got ", depths[j]);
      check(shortcuts[j] == "input" || shortcuts[j] == "preact" || shortcuts[j] == "none",
            "shortcuts: expected 'input', 'preact' or 'none', got '", shortcuts[j], "'");
      units.push_back({first, first + static_cast<size_t>(depths[j]), shift});
      first = units.back().end;
      shift += projections[j].has_value();
    }
    check(first > 0, "depths: expected at least one unit");
    check_count("weights", weights, first);
    check_count("geometries", geometries, kGeometry * (first + shift));
    if (!composed.empty()) check_count("composed", composed, first + shift);
  }

  // Of convolution k of a unit; its projection is k = unit.end.
  Geometry geometry(const UnitLayers& unit, size_t k) const {
    const auto g = geometries.begin() + static_cast<int64_t>(kGeometry * (k + unit.shift));
    return {{g, g + 2}, {g + 2, g + 6}, {g + 6, g + 8}, g[8]};
  }

  // Whether PyTorch's convolution runs it.
  bool composed(const UnitLayers& unit, size_t k) const {
    return !composed_convs.empty() && composed_convs[k + unit.shift];
  }
};

template <class Device>
struct UnitOperators {
  using Layer = Operators<Device>;

  // function(operators), of what runs convolution k of a unit.
  template <typename F>
  static auto with_conv(const Units& all, const UnitLayers& unit, size_t k, const F& function) {
    return all.composed(unit, k) ? function(Composed<Device>()) : function(Layer());
  }

  static std::tuple<Tensor, Tensors, Tensors, Tensors> preact_units_forward(
      const Tensor& input, const OptionalTensor& residual, Tensors weights,
      OptionalTensors bn_weights, OptionalTensors bn_biases, OptionalTensors stats,
      std::vector<double> eps, OptionalTensors projections, Sizes depths, Sizes geometries,
      std::vector<std::string> shortcuts, std::string activation, bool with_stats,
      bool for_backward, bool allow_tf32, Flags composed) {
    const Units all(weights, projections, depths, geometries, shortcuts, activation, allow_tf32,
                    composed);
    const size_t n = weights.size();
    check_count("bn_weights", bn_weights, n);
    check_count("bn_biases", bn_biases, n);
    check_count("stats", stats, n);
    check_count("eps", eps, n);
    [[maybe_unused]] const typename Device::Call call(input);
    const auto affine_of = [&](size_t k) {
      return Layer::bn_affine(*stats[k], bn_weights[k], bn_biases[k], eps[k]);
    };

    Tensors inputs, affines, all_stats;
    Tensor u = input;
    OptionalTensor affine;
    if (stats[0]) affine = affine_of(0);
    if (affine && for_backward) affines.push_back(*affine);
    for (size_t j = 0; j < all.units.size(); ++j) {
      const UnitLayers& unit = all.units[j];
      const Tensor unit_input = u;
      const OptionalTensor preact = shortcuts[j] == "preact" ? affine : std::nullopt;
      for (size_t k = unit.first; k < unit.end; ++k) {
        const bool is_output = k + 1 == n, takes_stats = !is_output && !stats[k + 1];
        OptionalTensor added, next_weight, next_bias;
        std::optional<double> next_eps;
        if (k + 1 == unit.end)
          added = shortcuts[j] == "none" ? residual : shortcut(all, j, unit_input, preact);
        if (takes_stats) {
          next_weight = bn_weights[k + 1];
          next_bias = bn_biases[k + 1];
          next_eps = eps[k + 1];
        }
        const auto [stride, padding, dilation, groups] = all.geometry(unit, k);
        Tensor output_stats, next;
        std::tie(u, output_stats, next) = with_conv(all, unit, k, [&](auto conv) {
          return conv.preact_conv_forward(u, affine, weights[k], added, stride, padding, dilation,
                                          groups, activation, is_output ? with_stats : takes_stats,
                                          allow_tf32, next_weight, next_bias, next_eps);
        });
        all_stats.push_back(output_stats);
        if (is_output) break;
        affine = takes_stats ? next : affine_of(k + 1);
        if (!for_backward) continue;
        inputs.push_back(u);
        affines.push_back(*affine);
      }
    }
    return {u, inputs, affines, all_stats};
  }

  static std::tuple<Tensor, Tensors, Tensors, Tensors> preact_units_backward(
      const Tensor& grad, Tensors inputs, Tensors affines, Tensors weights, Flags batch_stats,
      OptionalTensors projections, Sizes depths, Sizes geometries,
      std::vector<std::string> shortcuts, std::string activation, bool needs_input,
      Flags needs_weights, Flags needs_sums, Flags needs_projections, bool allow_tf32,
      Flags composed) {
    const Units all(weights, projections, depths, geometries, shortcuts, activation, allow_tf32,
                    composed);
    const size_t n = weights.size();
    check_count("inputs", inputs, n);
    check_count("batch_stats", batch_stats, n);
    check_count("needs_weights", needs_weights, n);
    check_count("needs_sums", needs_sums, n);
    check_count("needs_projections", needs_projections, all.units.size());
    check(affines.size() == n || affines.size() == n - 1, "affines: expected ", n, " or ", n - 1,
          ", got ", affines.size());
    typename Device::Call call(grad);
    OptionalTensors by_conv(n - affines.size());
    by_conv.insert(by_conv.end(), affines.begin(), affines.end());

    OptionalTensors dweights(n), sums(n), dprojections(all.units.size());
    Tensor g = grad;
    // Where there is an output, g is of the BatchNorm that reads it, whose backward pass ends when
    // the next operator loads g. If it is a unit's output, the gradient `joins` is added then.
    OptionalTensor output, output_affine, output_sums, joins;
    const auto end_backward_pass = [&] {
      if (!output) return;
      const Tensor to = Device::kResidualGradInPlace ? g : new_activation(g, image_shape(g));
      g = Layer::residual_grad_into(to, joins, g, *output, *output_affine, *output_sums);
      output = output_affine = output_sums = joins = std::nullopt;
    };
    for (size_t j = all.units.size(); j-- > 0;) {
      const UnitLayers& unit = all.units[j];
      const size_t first = unit.first, last = unit.end - 1;
      const OptionalTensor& affine = by_conv[first];
      const bool needs_before = needs_input || any(needs_weights, 0, first) ||
                                any(needs_sums, 0, first) || any(needs_projections, 0, j);
      // the shortcut's gradient joins at h, before the activation's slope, or at the input
      const bool joins_h = shortcuts[j] == "preact" || !affine;
      const bool on_the_way =
          last > first && needs_before && needs_weights[last] && batch_stats[last];
      if (!on_the_way) end_backward_pass();

      Tensor dy = g;
      OptionalTensor to_shortcut;
      for (size_t k = unit.end; k-- > first;) {
        const auto [stride, padding, dilation, groups] = all.geometry(unit, k);
        if (!needs_before && !any(needs_weights, first, k) && !any(needs_sums, first, k + 1)) {
          if (needs_weights[k])
            dweights[k] = with_conv(all, unit, k, [&](auto conv) {
              return conv.preact_conv_wgrad(g, output, output_affine, output_sums, inputs[k],
                                            by_conv[k], {weights[k].size(2), weights[k].size(3)},
                                            stride, padding, dilation, groups, activation,
                                            allow_tf32);
            });
          break;
        }
        if (k == first && shortcuts[j] != "none" && (needs_before || joins_h))
          to_shortcut = shortcut_grad(all, j, dy, inputs[first]);
        const bool frozen = by_conv[k] && !batch_stats[k];
        OptionalTensor addend, ends_with;
        if (k == first && joins_h) addend = to_shortcut;
        if (k == first && !joins_h && frozen) ends_with = to_shortcut;
        const bool with_sums = batch_stats[k] || needs_sums[k];
        if (k == last && output)
          std::tie(dy, g, sums[k], dweights[k]) = with_conv(all, unit, k, [&](auto conv) {
            return conv.residual_conv_backward_into(
                Device::kResidualGradInPlace ? OptionalTensor(g) : std::nullopt, joins, g, *output,
                *output_affine, *output_sums, weights[k], inputs[k], *by_conv[k], stride, padding,
                dilation, groups, activation, allow_tf32);
          });
        else if (needs_weights[k])
          std::tie(g, sums[k], dweights[k]) = with_conv(all, unit, k, [&](auto conv) {
            return conv.preact_conv_backward(g, output, output_affine, output_sums, weights[k],
                                             inputs[k], by_conv[k], addend, stride, padding,
                                             dilation, groups, activation, with_sums, allow_tf32,
                                             frozen, ends_with);
          });
        else
          std::tie(g, sums[k]) = with_conv(all, unit, k, [&](auto conv) {
            return conv.preact_conv_dgrad(g, output, output_affine, output_sums, weights[k],
                                          inputs[k], by_conv[k], addend, stride, padding, dilation,
                                          groups, activation, with_sums, allow_tf32, frozen,
                                          ends_with);
          });
        // with frozen statistics, or without any, g is the gradient of inputs[k] itself
        output = batch_stats[k] ? OptionalTensor(inputs[k]) : std::nullopt;
        output_affine = batch_stats[k] ? by_conv[k] : std::nullopt;
        output_sums = batch_stats[k] ? sums[k] : std::nullopt;
      }
      if (needs_projections[j]) {
        const auto [stride, padding, dilation, groups] = all.geometry(unit, unit.end);
        const Tensor& projection = *projections[j];
        dprojections[j] = with_conv(all, unit, unit.end, [&](auto conv) {
          return conv.preact_conv_wgrad(dy, std::nullopt, std::nullopt, std::nullopt, inputs[first],
                                        shortcuts[j] == "preact" ? affine : std::nullopt,
                                        {projection.size(2), projection.size(3)}, stride, padding,
                                        dilation, groups, activation, allow_tf32);
        });
      }
      if (!needs_before) {
        g = nothing(grad);
        output = std::nullopt;
        break;
      }
      joins = output && !joins_h ? to_shortcut : std::nullopt;
    }
    end_backward_pass();
    call.finish();
    return {g, or_nothing(dweights, grad), or_nothing(sums, grad), or_nothing(dprojections, grad)};
  }

 private:
  static Tensor shortcut(const Units& all, size_t j, const Tensor& input,
                         const OptionalTensor& affine) {
    const OptionalTensor& projection = all.projections[j];
    if (!projection) return affine ? Layer::bn_relu_forward(input, *affine, all.activation) : input;
    const UnitLayers& unit = all.units[j];
    const auto [stride, padding, dilation, groups] = all.geometry(unit, unit.end);
    return std::get<0>(with_conv(all, unit, unit.end, [&](auto conv) {
      return conv.preact_conv_forward(input, affine, *projection, std::nullopt, stride, padding,
                                      dilation, groups, all.activation, false, all.allow_tf32,
                                      std::nullopt, std::nullopt, std::nullopt);
    }));
  }

  // Of what the shortcut reads.
  static Tensor shortcut_grad(const Units& all, size_t j, const Tensor& grad, const Tensor& input) {
    const OptionalTensor& projection = all.projections[j];
    if (!projection) return grad;
    const UnitLayers& unit = all.units[j];
    const auto [stride, padding, dilation, groups] = all.geometry(unit, unit.end);
    return std::get<0>(with_conv(all, unit, unit.end, [&](auto conv) {
      return conv.preact_conv_dgrad(grad, std::nullopt, std::nullopt, std::nullopt, *projection,
                                    input, std::nullopt, std::nullopt, stride, padding, dilation,
                                    groups, all.activation, false, all.allow_tf32, false,
                                    std::nullopt);
    }));
  }
};

// Into an m of STABLE_TORCH_LIBRARY.
template <class Library>
void define_unit_operators(Library& m) {
  m.def(
      "preact_units_forward(Tensor input, Tensor? residual, Tensor[] weights, "
      "Tensor?[] bn_weights, Tensor?[] bn_biases, Tensor?[] stats, float[] eps, "
      "Tensor?[] projections, int[] depths, int[] geometries, str[] shortcuts, str activation, "
      "bool with_stats, bool for_backward, bool allow_tf32=False, bool[] composed=[]) "
      "-> (Tensor, Tensor[], Tensor[], Tensor[])");
  m.def(
      "preact_units_backward(Tensor grad, Tensor[] inputs, Tensor[] affines, Tensor[] weights, "
      "bool[] batch_stats, Tensor?[] projections, int[] depths, int[] geometries, "
      "str[] shortcuts, str activation, bool needs_input, bool[] needs_weights, "
      "bool[] needs_sums, bool[] needs_projections, bool allow_tf32=False, bool[] composed=[]) "
      "-> (Tensor, Tensor[], Tensor[], Tensor[])");
}

// Into an m of STABLE_TORCH_LIBRARY_IMPL.
template <class Device, class Library>
void implement_unit_operators(Library& m) {
  m.impl("preact_units_forward", TORCH_BOX(&UnitOperators<Device>::preact_units_forward));
  m.impl("preact_units_backward", TORCH_BOX(&UnitOperators<Device>::preact_units_backward));
}

}  // namespace preact
