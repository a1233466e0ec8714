// Every CPU kernel against plain loops in double, without torch: odd sizes, strides, one-sided
// padding, both activations, all dtypes, unwritten memory poisoned with NaN, and work done in
// another order with the same bits coming out.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include "preact.h"

using namespace preact;

namespace {

// --- numbers -------------------------------------------------------------------------------------

using Doubles = std::vector<double>;

double widen(double x) { return x; }
double widen(float x) { return x; }
double widen(bf16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

template <typename S>
S narrow(double x) {
  if constexpr (std::is_same_v<S, bf16>)  // truncated: these are only made-up inputs
    return {static_cast<uint16_t>(std::bit_cast<uint32_t>(static_cast<float>(x)) >> 16)};
  else
    return static_cast<S>(x);
}

template <typename S>
constexpr Dtype kDtype = std::is_same_v<S, double>  ? Dtype::kFloat64
                         : std::is_same_v<S, float> ? Dtype::kFloat32
                                                    : Dtype::kBFloat16;
template <typename S>
using Accumulator = std::conditional_t<std::is_same_v<S, double>, double, float>;

// Relative to the largest value; a kernel may or may not round h to bfloat16 on the way.
template <typename S>
constexpr double kTolerance = std::is_same_v<S, double>  ? 1e-13
                              : std::is_same_v<S, float> ? 1e-5
                                                         : 2e-2;

template <typename S>
Doubles widen(const std::vector<S>& values) {
  Doubles out;
  for (S x : values) out.push_back(widen(x));
  return out;
}

template <typename S>
std::vector<S> random(int64_t count) {
  static uint64_t state = 1;
  std::vector<S> out;
  for (int64_t i = 0; i < count; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    out.push_back(narrow<S>(static_cast<double>(state >> 40) / (1 << 23) - 1));
  }
  return out;
}

template <typename S>
std::vector<S> poisoned(int64_t count) {
  return std::vector<S>(count, narrow<S>(NAN));
}

int failures = 0;

template <typename S>
void expect_near(const std::string& what, const std::vector<S>& got, const Doubles& want,
                 double tolerance) {
  double error = 0, largest = 1;
  for (size_t i = 0; i < want.size(); ++i) {
    const double difference = std::abs(widen(got[i]) - want[i]);
    error = std::isnan(difference) ? INFINITY : std::max(error, difference);
    largest = std::max(largest, std::abs(want[i]));
  }
  if (error <= tolerance * largest) return;
  std::printf("FAILED %s: error %g, allowed %g\n", what.c_str(), error, tolerance * largest);
  ++failures;
}

template <typename S>
void expect_equal(const std::string& what, const std::vector<S>& a, const std::vector<S>& b) {
  if (std::memcmp(a.data(), b.data(), a.size() * sizeof(S)) == 0) return;
  std::printf("FAILED %s: another order of work gave another result\n", what.c_str());
  ++failures;
}

// --- the definitions -----------------------------------------------------------------------------

struct Bn {  // [4, C]: mean, rstd, scale, shift
  Doubles affine;
  int64_t channels;
  Activation activation;

  double centred(double u, int64_t i) const { return u - affine[i % channels]; }
  double rstd(int64_t i) const { return affine[channels + i % channels]; }
  double scale(int64_t i) const { return affine[2 * channels + i % channels]; }
  double z(double u, int64_t i) const {
    return scale(i) * centred(u, i) + affine[3 * channels + i % channels];
  }
  double h(double u, int64_t i) const {
    const double x = z(u, i);
    return activation == Activation::kRelu ? std::max(x, 0.) : x / (1 + std::exp(-x));
  }
  double slope(double u, int64_t i) const {
    const double x = z(u, i), sigmoid = 1 / (1 + std::exp(-x));
    if (activation == Activation::kRelu) return x > 0;
    return sigmoid * (1 + x * (1 - sigmoid));
  }
};

Doubles stats_of(const Doubles& u, int64_t channels) {
  const double values = static_cast<double>(u.size()) / channels;
  Doubles out(2 * channels);
  for (size_t i = 0; i < u.size(); ++i) out[i % channels] += u[i] / values;
  for (size_t i = 0; i < u.size(); ++i)
    out[channels + i % channels] += std::pow(u[i] - out[i % channels], 2) / values;
  return out;
}

Doubles sums_of(const Doubles& g, const Doubles& u, const Bn& bn) {
  Doubles out(2 * bn.channels);
  for (size_t i = 0; i < g.size(); ++i) {
    out[i % bn.channels] += g[i];
    out[bn.channels + i % bn.channels] += g[i] * bn.centred(u[i], i) * bn.rstd(i);
  }
  return out;
}

// The rest of BatchNorm's backward pass; frozen statistics take no sums.
Doubles bn_grad(const Doubles& g, const Doubles& u, const Doubles* sums, const Bn& bn) {
  const double values = static_cast<double>(g.size()) / bn.channels;
  Doubles out(g.size());
  for (size_t i = 0; i < g.size(); ++i) {
    const int64_t c = i % bn.channels;
    out[i] = bn.scale(i) * g[i];
    if (sums)
      out[i] -= bn.scale(i) / values *
                ((*sums)[c] + bn.rstd(i) * (*sums)[bn.channels + c] * bn.centred(u[i], i));
  }
  return out;
}

// f(output, input, weight): the offsets of each product of a convolution.
template <typename F>
void for_each_product(const ConvShape& s, F f) {
  const ImageShape &in = s.input, &out = s.output;
  for (int64_t n = 0; n < out.images; ++n)
    for (int64_t p = 0; p < out.height; ++p)
      for (int64_t q = 0; q < out.width; ++q)
        for (int64_t r = 0; r < s.kernel_height; ++r)
          for (int64_t t = 0; t < s.kernel_width; ++t) {
            const int64_t y = p * s.stride_height + r - s.pad_top;
            const int64_t x = q * s.stride_width + t - s.pad_left;
            if (y < 0 || y >= in.height || x < 0 || x >= in.width) continue;
            for (int64_t k = 0; k < out.channels; ++k)
              for (int64_t c = 0; c < in.channels; ++c)
                f(((n * out.height + p) * out.width + q) * out.channels + k,
                  ((n * in.height + y) * in.width + x) * in.channels + c,
                  ((k * in.channels + c) * s.kernel_height + r) * s.kernel_width + t);
          }
}

// --- the kernels ---------------------------------------------------------------------------------

void forwards(int64_t count, void (*body)(int64_t, void*), void* context) {
  for (int64_t i = 0; i < count; ++i) body(i, context);
}

void backwards(int64_t count, void (*body)(int64_t, void*), void* context) {
  for (int64_t i = count; i-- > 0;) body(i, context);
}

// The products of pairs, as a processor with bfloat16 instructions has them.
void pairs_tile(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc,
                bool accumulate, const bf16* a, const bf16* b, float* c) {
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) {
      float sum = accumulate ? c[i * ldc + j] : 0;
      for (int64_t l = 0; l < k; ++l)
        sum += widen(a[i * lda + l]) * widen(b[l / 2 * 2 * ldb + 2 * j + l % 2]);
      c[i * ldc + j] = sum;
    }
}

Runtime in_order{forwards, 1, portable_tile<float>(), {}, 2, true};
Runtime reversed{backwards, 300, portable_tile<float>(), {}, 2, false};  // more than filters

int64_t size_of(const ImageShape& shape) { return shape.pixels() * shape.channels; }

template <typename S>
struct Layer {  // a BatchNorm on an activation u
  using A = Accumulator<S>;
  ImageShape shape;
  std::vector<S> u;
  std::vector<A> affine, sums;
  Bn bn;

  Layer(const ImageShape& shape, Activation activation)
      : shape(shape), u(random<S>(size_of(shape))), sums(random<A>(2 * shape.channels)) {
    affine = random<A>(4 * shape.channels);
    for (int64_t c = 0; c < shape.channels; ++c) affine[shape.channels + c] += A(1.5);  // rstd > 0
    bn = {widen(affine), shape.channels, activation};
  }

  Doubles h() const {
    Doubles out = widen(u);
    for (size_t i = 0; i < out.size(); ++i) out[i] = bn.h(out[i], i);
    return out;
  }
};

template <typename S>
void test_pointwise(const std::string& name, const ImageShape& shape, Activation activation) {
  using A = Accumulator<S>;
  const int64_t channels = shape.channels, size = size_of(shape);
  const Layer<S> layer(shape, activation);
  const Doubles u = widen(layer.u);

  auto stats = poisoned<A>(2 * channels), again = stats;
  bn_stats(in_order, kDtype<S>, shape, layer.u.data(), stats.data());
  bn_stats(reversed, kDtype<S>, shape, layer.u.data(), again.data());
  expect_near(name + " bn_stats", stats, stats_of(u, channels), kTolerance<A>);
  expect_equal(name + " bn_stats", stats, again);

  const auto weight = random<A>(channels), bias = random<A>(channels);
  auto affine = poisoned<A>(4 * channels);
  bn_affine(kDtype<A>, channels, stats.data(), weight.data(), bias.data(), 1e-5, affine.data());
  Doubles want(4 * channels);
  for (int64_t c = 0; c < channels; ++c) {
    want[c] = stats[c];
    want[channels + c] = 1 / std::sqrt(stats[channels + c] + 1e-5);
    want[2 * channels + c] = want[channels + c] * weight[c];
    want[3 * channels + c] = bias[c];
  }
  expect_near(name + " bn_affine", affine, want, kTolerance<A>);

  auto h = poisoned<S>(size);
  bn_relu_forward(in_order, kDtype<S>, shape, activation, layer.u.data(), layer.affine.data(),
                  h.data());
  expect_near(name + " bn_relu_forward", h, layer.h(), kTolerance<S>);

  const auto grad = random<S>(size);
  auto g = poisoned<S>(size);
  auto sums = poisoned<A>(2 * channels);
  bn_relu_backward(in_order, kDtype<S>, shape, activation, grad.data(), layer.u.data(),
                   layer.affine.data(), false, nullptr, g.data(), sums.data());
  Doubles want_g = widen(grad);
  for (int64_t i = 0; i < size; ++i) want_g[i] *= layer.bn.slope(u[i], i);
  expect_near(name + " bn_relu_backward g", g, want_g, kTolerance<S>);
  expect_near(name + " bn_relu_backward sums", sums, sums_of(want_g, u, layer.bn), kTolerance<S>);

  auto dinput = poisoned<S>(size);
  residual_grad(in_order, kDtype<S>, shape, grad.data(), g.data(), layer.u.data(),
                layer.affine.data(), sums.data(), dinput.data());
  const Doubles read = widen(sums);
  Doubles want_du = bn_grad(widen(g), u, &read, layer.bn);
  for (int64_t i = 0; i < size; ++i) want_du[i] += widen(grad[i]);
  expect_near(name + " residual_grad", dinput, want_du, kTolerance<S>);

  bn_relu_backward(in_order, kDtype<S>, shape, activation, grad.data(), layer.u.data(),
                   layer.affine.data(), true, grad.data(), dinput.data(), sums.data());
  want_du = bn_grad(want_g, u, nullptr, layer.bn);
  for (int64_t i = 0; i < size; ++i) want_du[i] += widen(grad[i]);
  expect_near(name + " bn_relu_backward frozen", dinput, want_du, kTolerance<S>);
  expect_near(name + " bn_relu_backward frozen sums", sums, sums_of(want_g, u, layer.bn),
              kTolerance<S>);
}

// deferred: the gradient arrives as the g of the next BatchNorm. plain: there is no BatchNorm
// before the convolution.
template <typename S>
void test_conv(const std::string& name, const ConvShape& shape, Activation activation,
               bool deferred, bool plain, bool weight_channels_last) {
  using A = Accumulator<S>;
  const Layer<S> in(shape.input, activation), out(shape.output, activation);
  const int64_t in_size = size_of(shape.input), out_size = size_of(shape.output);
  const int64_t c = shape.input.channels, k = shape.output.channels;
  const int64_t r = shape.kernel_height, s = shape.kernel_width;
  const void* affine = plain ? nullptr : in.affine.data();
  const Doubles u = widen(in.u), h = plain ? u : in.h();

  const auto kcrs = random<S>(k * c * r * s);
  const Doubles w = widen(kcrs);
  std::vector<S> stored = kcrs;
  Weight weight{stored.data(), c * r * s, r * s, s, 1};
  if (weight_channels_last) {
    weight = {stored.data(), r * s * c, 1, s * c, c};
    for (int64_t i = 0; i < k * c * r * s; ++i)
      stored[i / (c * r * s) * weight.stride_k + i / (r * s) % c * weight.stride_c +
             i / s % r * weight.stride_r + i % s * weight.stride_s] = kcrs[i];
  }

  const auto residual = random<S>(out_size);
  auto y = poisoned<S>(out_size), y_again = y;
  auto stats = poisoned<A>(2 * k), stats_again = stats;
  PreactConvForward forward{kDtype<S>, shape,           activation, in.u.data(), affine,
                            weight,    residual.data(), y.data(),   stats.data()};
  preact_conv_forward(in_order, forward);
  forward.output = y_again.data();
  forward.stats = stats_again.data();
  preact_conv_forward(reversed, forward);
  Doubles want_y = widen(residual);
  for_each_product(shape, [&](int64_t o, int64_t i, int64_t j) { want_y[o] += h[i] * w[j]; });
  expect_near(name + " forward y", y, want_y, kTolerance<S>);
  expect_near(name + " forward stats", stats, stats_of(widen(y), k), kTolerance<A>);
  expect_equal(name + " forward y", y, y_again);
  expect_equal(name + " forward stats", stats, stats_again);

  const auto grad = random<S>(out_size);
  OutputGrad output_grad{grad.data(), nullptr, nullptr, nullptr};
  Doubles dy = widen(grad);
  if (deferred) {
    output_grad = {grad.data(), out.u.data(), out.affine.data(), out.sums.data()};
    const Doubles sums = widen(out.sums);
    dy = bn_grad(dy, widen(out.u), &sums, out.bn);
  }

  const auto addend = random<S>(in_size);
  auto g = poisoned<S>(in_size), g_again = g;
  auto sums = poisoned<A>(2 * c), sums_again = sums;
  PreactConvDgrad dgrad{
      kDtype<S>,   shape,  activation,    output_grad, weight,
      in.u.data(), affine, addend.data(), g.data(),    plain ? nullptr : sums.data()};
  preact_conv_dgrad(in_order, dgrad);
  dgrad.g = g_again.data();
  dgrad.sums = plain ? nullptr : sums_again.data();
  preact_conv_dgrad(reversed, dgrad);
  Doubles want_g = widen(addend);
  for_each_product(shape, [&](int64_t o, int64_t i, int64_t j) { want_g[i] += dy[o] * w[j]; });
  if (!plain)
    for (int64_t i = 0; i < in_size; ++i) want_g[i] *= in.bn.slope(u[i], i);
  expect_near(name + " dgrad g", g, want_g, kTolerance<S>);
  expect_equal(name + " dgrad g", g, g_again);
  if (!plain) {
    expect_near(name + " dgrad sums", sums, sums_of(want_g, u, in.bn), kTolerance<S>);
    expect_equal(name + " dgrad sums", sums, sums_again);
  }

  if (!plain) {
    PreactConvDgrad frozen = dgrad;
    auto du = poisoned<S>(in_size);
    frozen.g = du.data();
    frozen.frozen = true;
    frozen.residual = addend.data();
    preact_conv_dgrad(in_order, frozen);
    Doubles want_du = bn_grad(want_g, u, nullptr, in.bn);
    for (int64_t i = 0; i < in_size; ++i) want_du[i] += widen(addend[i]);
    expect_near(name + " dgrad frozen", du, want_du, kTolerance<S>);
    expect_near(name + " dgrad frozen sums", sums_again, sums_of(want_g, u, in.bn), kTolerance<S>);
  }

  auto dw = poisoned<A>(k * c * r * s), dw_again = dw;
  PreactConvWgrad wgrad{kDtype<S>, shape, activation, output_grad, in.u.data(), affine, dw.data()};
  preact_conv_wgrad(in_order, wgrad);
  wgrad.dweight = dw_again.data();
  preact_conv_wgrad(reversed, wgrad);
  Doubles want_dw(k * c * r * s);  // [K, R, S, C]
  for_each_product(shape, [&](int64_t o, int64_t i, int64_t j) {
    const int64_t tap = j % (r * s), channel = j / (r * s) % c, filter = j / (r * s * c);
    want_dw[(filter * r * s + tap) * c + channel] += h[i] * dy[o];
  });
  expect_near(name + " wgrad", dw, want_dw, kTolerance<S>);
  expect_equal(name + " wgrad", dw, dw_again);

  for (const Runtime& runtime : {in_order, reversed}) {
    std::fill(g_again.begin(), g_again.end(), S{});
    std::fill(sums_again.begin(), sums_again.end(), A{});
    std::fill(dw_again.begin(), dw_again.end(), A{});
    preact_conv_backward(runtime, dgrad, wgrad);
    expect_equal(name + " backward g", g, g_again);
    if (!plain) expect_equal(name + " backward sums", sums, sums_again);
    expect_equal(name + " backward dw", dw, dw_again);
  }

  if (plain || !deferred) return;
  // the same of a residual sum, whose gradient is made before or on the way
  auto made = poisoned<S>(out_size), on_the_way = made;
  residual_grad(in_order, kDtype<S>, shape.output, residual.data(), grad.data(), out.u.data(),
                out.affine.data(), out.sums.data(), made.data());
  dgrad.addend = nullptr;
  dgrad.grad = wgrad.grad = {made.data(), nullptr, nullptr, nullptr};
  preact_conv_backward(in_order, dgrad, wgrad);
  g = g_again;
  sums = sums_again;
  dw = dw_again;
  dgrad.grad = wgrad.grad = output_grad;
  dgrad.grad.residual = wgrad.grad.residual = residual.data();
  dgrad.grad.dy = wgrad.grad.dy = on_the_way.data();
  for (const Runtime& runtime : {in_order, reversed}) {
    std::fill(on_the_way.begin(), on_the_way.end(), S{});
    std::fill(g_again.begin(), g_again.end(), S{});
    preact_conv_backward(runtime, dgrad, wgrad);
    expect_equal(name + " sum dy", made, on_the_way);
    expect_equal(name + " sum g", g, g_again);
    expect_equal(name + " sum sums", sums, sums_again);
    expect_equal(name + " sum dw", dw, dw_again);
  }
}

ConvShape conv_shape(const ImageShape& input, int64_t out_channels, int64_t kernel, int64_t stride,
                     int64_t top, int64_t bottom, int64_t left, int64_t right) {
  const int64_t height = (input.height + top + bottom - kernel) / stride + 1;
  const int64_t width = (input.width + left + right - kernel) / stride + 1;
  return {input, {input.images, height, width, out_channels}, kernel, kernel, stride, stride, top,
          left};
}

template <typename S>
void test_all(const std::string& dtype) {
  const ImageShape images[] = {
      {1, 1, 1, 1}, {2, 5, 7, 3}, {3, 4, 4, 65}, {1, 9, 3, 16}, {3, 40, 41, 20}};
  const ConvShape convs[] = {
      conv_shape({2, 5, 7, 3}, 5, 1, 1, 0, 0, 0, 0),      // 1x1
      conv_shape({3, 4, 4, 65}, 17, 1, 1, 0, 0, 0, 0),    // more channels than a vector register
      conv_shape({2, 5, 6, 16}, 8, 1, 2, 0, 0, 0, 0),     // 1x1, pixels left out
      conv_shape({2, 5, 7, 3}, 5, 3, 1, 1, 1, 1, 1),      // 3x3
      conv_shape({1, 9, 8, 33}, 20, 3, 1, 1, 1, 1, 1),    //
      conv_shape({2, 6, 7, 4}, 6, 3, 2, 1, 1, 1, 1),      // 3x3, stride 2
      conv_shape({2, 6, 8, 4}, 6, 3, 2, 0, 1, 0, 1),      // padded below and on the right only
      conv_shape({2, 5, 4, 4}, 6, 3, 1, 2, 0, 0, 1),      //
      conv_shape({2, 5, 5, 3}, 4, 3, 1, 0, 0, 0, 0),      // no padding
      conv_shape({2, 1, 1, 4}, 3, 3, 1, 1, 1, 1, 1),      // nothing but padding around one pixel
      conv_shape({2, 4, 5, 4}, 3, 1, 2, 1, 1, 2, 0),      // 1x1, padded
      conv_shape({1, 3, 3, 2}, 3, 3, 2, 4, 3, 4, 3),      // padded by more than the kernel
      conv_shape({1, 3, 2, 1}, 1, 3, 1, 1, 1, 1, 1),      // one channel
      conv_shape({3, 30, 31, 32}, 8, 1, 1, 0, 0, 0, 0),   // more than one part of the work
      conv_shape({1, 40, 41, 48}, 16, 3, 1, 1, 1, 1, 1),  //
      conv_shape({2, 5, 7, 20}, 17, 3, 1, 2, 0, 0, 2),    // in fewer multiplications, padded
      conv_shape({2, 7, 6, 16}, 16, 3, 1, 0, 0, 0, 0),    // on one side or not,
      conv_shape({18, 2, 3, 16}, 24, 3, 1, 1, 1, 1, 1),   // of several images at once
  };
  for (const Activation activation : {Activation::kRelu, Activation::kSilu}) {
    const std::string prefix = dtype + (activation == Activation::kRelu ? " relu " : " silu ");
    for (size_t i = 0; i < std::size(images); ++i)
      test_pointwise<S>(prefix + "image " + std::to_string(i), images[i], activation);
    for (size_t i = 0; i < std::size(convs); ++i)
      for (int variant = 0; variant < 4; ++variant)
        test_conv<S>(prefix + "conv " + std::to_string(i) + " variant " + std::to_string(variant),
                     convs[i], activation, variant & 1, variant & 2, variant == 1 || variant == 2);
  }
}

// Whose dW is wide.
template <typename S>
void test_wide(const std::string& dtype) {
  const ConvShape convs[] = {
      conv_shape({20, 1, 3, 70}, 210, 3, 1, 1, 1, 1, 1),    // 3x3, in all multiplications
      conv_shape({18, 5, 6, 70}, 210, 3, 2, 1, 1, 1, 1),    // 3x3, stride 2, more bands than parts
      conv_shape({2, 19, 60, 70}, 210, 3, 2, 1, 1, 1, 1),   // bands of different heights
      conv_shape({3, 6, 5, 70}, 210, 3, 1, 4, 3, 4, 3),     // rows of nothing but padding
      conv_shape({3, 9, 11, 260}, 510, 1, 2, 0, 0, 0, 0),   // 1x1, pixels left out
      conv_shape({2, 10, 13, 65}, 2100, 1, 1, 0, 0, 0, 0),  // 1x1, more bands than parts
      conv_shape({1, 9, 7, 1100}, 130, 1, 1, 0, 0, 0, 0),   // fewer bands than parts
  };
  for (size_t i = 0; i < std::size(convs); ++i)
    test_conv<S>(dtype + " wide " + std::to_string(i), convs[i], Activation::kRelu, true, false,
                 true);
}

}  // namespace

int main() {
  test_all<float>("float32");
  for (const ImageShape& image : {ImageShape{3, 2, 2, 260}, {1, 130, 3, 260}})
    test_conv<float>("weights that fill the caches", conv_shape(image, 256, 3, 1, 1, 1, 1, 1),
                     Activation::kRelu, true, false, true);
  test_all<double>("float64");
  test_all<bf16>("bfloat16");
  in_order.pairs_tile = reversed.pairs_tile = {pairs_tile, 64, false, false};
  test_all<bf16>("bfloat16 in pairs");
  in_order.pairs_tile.alike = reversed.pairs_tile.alike = true;
  in_order.pairs_depth = reversed.pairs_depth = 32;
  test_all<bf16>("bfloat16 in pairs, 32 deep");
  if (portable_pairs_tile().multiply) {
    in_order.pairs_tile = reversed.pairs_tile = portable_pairs_tile();
    in_order.pairs_depth = reversed.pairs_depth = 2;
    test_all<bf16>("bfloat16 by this processor");
  }
  in_order.pairs_tile = reversed.pairs_tile = {};
  test_wide<float>("float32");
  test_wide<double>("float64");
  test_wide<bf16>("bfloat16");
  in_order.pairs_tile = reversed.pairs_tile = {pairs_tile, 64, false, false};
  test_wide<bf16>("bfloat16 in pairs");
  in_order.pairs_tile.alike = reversed.pairs_tile.alike = true;
  in_order.pairs_depth = reversed.pairs_depth = 32;
  test_wide<bf16>("bfloat16 in pairs, 32 deep");
  std::printf(failures ? "%d checks failed\n" : "all checks passed\n", failures);
  return failures != 0;
}
