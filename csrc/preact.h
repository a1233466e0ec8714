// What a kernel is asked for: plain structs and launcher prototypes, no torch header.
//
// Activations lie in memory as [N, H, W, C] (channels_last); C runs fastest. Statistics, affines,
// sums and weight gradients are in the accumulator's type: double for double, else float.
//   stats  [2, C]  mean, biased variance
//   affine [4, C]  mean, rstd, scale = gamma * rstd, shift = beta
//   sums   [2, C]  S1 = sum g, S2 = sum g * (u - mean) * rstd
#pragma once

#include <cstdint>

namespace preact {

enum class Dtype { kFloat32, kBFloat16, kFloat16, kFloat64 };  // CPU: no float16; CUDA: no float64
enum class Activation { kRelu, kSilu };

struct ImageShape {
  int64_t images, height, width, channels;

  int64_t pixels() const { return images * height * width; }
};

struct ConvShape {
  ImageShape input;       // N, H, W, C
  ImageShape output;      // N, P, Q, K
  int64_t kernel_height;  // R
  int64_t kernel_width;   // S
  int64_t stride_height, stride_width;
  int64_t pad_top, pad_left;  // bottom and right follow from the output's size
};

// A convolution's weight as it lies in memory, whatever its strides (in elements).
struct Weight {
  const void* data;  // [K, C, R, S]
  int64_t stride_k, stride_c, stride_r, stride_s;
};

// The gradient dy of a convolution's output. With `output`, grad is the g of the BatchNorm that
// reads it, whose backward pass is finished on load:
//   dy = residual + scale * g - scale * rstd * S2 / M * (output - mean) - scale * S1 / M
// Of a residual sum others read dy as well: it is written, if not null.
struct OutputGrad {
  const void* grad;                // [N, P, Q, K]
  const void* output;              // [N, P, Q, K] or null: dy = grad
  const void* affine;              // [4, K]
  const void* sums;                // [2, K]
  const void* residual = nullptr;  // [N, P, Q, K] or null; null without dy
  void* dy = nullptr;              // [N, P, Q, K]; null for all but preact_conv_backward
};

// C[m, n] (+)= A[m, k] B[k, n], all row-major, leading dimensions in elements.
template <typename Operand, typename Sum = Operand>
struct Tile {
  void (*multiply)(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc,
                   bool accumulate, const Operand* a, const Operand* b, Sum* c);
  int64_t columns;  // of a B that is laid out for it, in blocks [n / columns][k][columns]
  bool copies;      // so does it lay out any other B, each time
  bool alike;       // products had better all be of one height, and all stored or all added
};

struct bf16 {
  uint16_t bits;
};

// Our own, of float or double.
template <typename T>
Tile<T> portable_tile();
// A Runtime's pairs_tile of our own; its lda is even.
Tile<bf16, float> portable_pairs_tile();
// C[m, n] (+)= A[k, m]^T B[k, n]
template <typename T>
Tile<T> transposed_tile();

// What the kernels need of the program that they run in.
struct Runtime {
  // body(i, context) for each i in [0, count), in any order, on any threads
  void (*parallel_for)(int64_t count, void (*body)(int64_t, void*), void* context);
  int64_t threads;  // how many that may be
  Tile<float> tile;
  // bfloat16 operands, B in pairs of rows: [k / 2, n, 2], k even. Its multiply is null where the
  // processor has none.
  Tile<bf16, float> pairs_tile;
  // Of a long product, where it is free: a multiple of this many runs faster. At least 2.
  int64_t pairs_depth;
  // Whether kernels ask for memory while they multiply (cpu/ahead.h).
  bool asks_ahead;
};

// The CPU kernels. A launcher of the same name with a CudaRuntime runs the CUDA kernels instead, on
// device memory.

void bn_stats(const Runtime& runtime, Dtype dtype, const ImageShape& shape,
              const void* input,  // [N, H, W, C]
              void* stats);       // [2, C]

void bn_affine(Dtype accumulator, int64_t channels,
               const void* stats,   // [2, C]
               const void* weight,  // [C] or null: 1
               const void* bias,    // [C] or null: 0
               double eps,
               void* affine);  // [4, C]

// A BatchNorm's running statistics and those of a batch of M values a channel.
struct RunningStats {
  Dtype dtype;                      // of mean and var
  int64_t channels;                 // C
  void *mean, *var;                 // [C]
  int64_t mean_stride, var_stride;  // in elements
  const void* stats;                // [2, C]
  double momentum;
  double unbiased;  // M / (M - 1), for var
};
// Moves each towards its batch, one after the other.
void bn_update_running(Dtype accumulator, int64_t count, const RunningStats* updates);

void bn_relu_forward(const Runtime& runtime, Dtype dtype, const ImageShape& shape,
                     Activation activation,
                     const void* input,   // [N, H, W, C]
                     const void* affine,  // [4, C]
                     void* output);       // [N, H, W, C]

void bn_relu_backward(const Runtime& runtime, Dtype dtype, const ImageShape& shape,
                      Activation activation,
                      const void* grad,      // [N, H, W, C]
                      const void* input,     // [N, H, W, C]
                      const void* affine,    // [4, C]
                      bool frozen,           // as in PreactConvDgrad
                      const void* residual,  // [N, H, W, C] or null
                      void* g,               // [N, H, W, C]
                      void* sums);           // [2, C] or null

// What bn_affine is asked for, of statistics that are on their way.
struct NextAffine {
  const void* weight;  // [K] or null: 1
  const void* bias;    // [K] or null: 0
  double eps;
  void* affine;  // [4, K] or null
};

struct PreactConvForward {
  Dtype dtype;
  ConvShape shape;
  Activation activation;
  const void* input;        // [N, H, W, C]
  const void* affine;       // [4, C] or null: h = input
  Weight weight;            // [K, C, R, S]
  const void* residual;     // [N, P, Q, K] or null
  void* output;             // [N, P, Q, K]
  void* stats;              // [2, K] or null
  bool allow_tf32 = false;  // CUDA: float32 may be rounded to TF32 as it is multiplied
  NextAffine next = {};     // of the BatchNorm that reads output, by its stats
};
void preact_conv_forward(const Runtime& runtime, const PreactConvForward& op);

struct PreactConvDgrad {
  Dtype dtype;
  ConvShape shape;
  Activation activation;
  OutputGrad grad;     // [N, P, Q, K]
  Weight weight;       // [K, C, R, S]
  const void* input;   // [N, H, W, C]
  const void* affine;  // [4, C] or null: g = dh + addend
  const void* addend;  // [N, H, W, C] or null
  void* g;             // [N, H, W, C]
  void* sums;          // [2, C] or null
  bool allow_tf32 = false;
  // The statistics behind affine are constants, and BatchNorm's backward pass ends here: g becomes
  // residual + scale * g.
  bool frozen = false;
  const void* residual = nullptr;  // [N, H, W, C] or null
};
void preact_conv_dgrad(const Runtime& runtime, const PreactConvDgrad& op);

struct PreactConvWgrad {
  Dtype dtype;
  ConvShape shape;
  Activation activation;
  OutputGrad grad;     // [N, P, Q, K]
  const void* input;   // [N, H, W, C]
  const void* affine;  // [4, C] or null: h = input
  void* dweight;       // [K, R, S, C]
  bool allow_tf32 = false;
};
void preact_conv_wgrad(const Runtime& runtime, const PreactConvWgrad& op);

// Both gradients of one convolution, of the same operands.
void preact_conv_backward(const Runtime& runtime, const PreactConvDgrad& dgrad,
                          const PreactConvWgrad& wgrad);

void residual_grad(const Runtime& runtime, Dtype dtype, const ImageShape& shape,
                   const void* grad,    // [N, H, W, C] or null
                   const void* g,       // [N, H, W, C]
                   const void* input,   // [N, H, W, C]
                   const void* affine,  // [4, C]
                   const void* sums,    // [2, C]
                   void* dinput);       // [N, H, W, C]

// dW [K, taps, C] as the sum of partial results [splits, taps, K, C], in a fixed order.
struct SplitSum {
  const float* partial;
  float* dweight;
  int64_t splits, taps, filters, channels;
};

// What the CUDA kernels need of the program that they run in. Nothing synchronises: a launcher
// returns once its kernels are in the stream, and can be captured in a CUDA graph.
struct CudaRuntime {
  int device;
  void* stream;  // cudaStream_t
  // Device memory that nobody else writes before the stream is past this launcher's kernels.
  void* (*allocate)(int64_t bytes, void* context);
  void* (*allocate_zeros)(int64_t bytes, void* context);  // likewise, and it is zero
  // Likewise, for partial results: the program takes their sum, by add_splits(), at once or later.
  void* (*allocate_partial)(int64_t bytes, void* context);
  void (*sum_partial)(const SplitSum& sum, void* context);
  void* context;
};

// Why no kernel can run here, in words (a driver too old for the toolkit); null if they can.
const char* cuda_unavailable();

void bn_stats(const CudaRuntime& runtime, Dtype dtype, const ImageShape& shape, const void* input,
              void* stats);
void bn_affine(const CudaRuntime& runtime, Dtype accumulator, int64_t channels, const void* stats,
               const void* weight, const void* bias, double eps, void* affine);
void bn_update_running(const CudaRuntime& runtime, Dtype accumulator, int64_t count,
                       const RunningStats* updates);
void bn_relu_forward(const CudaRuntime& runtime, Dtype dtype, const ImageShape& shape,
                     Activation activation, const void* input, const void* affine, void* output);
void bn_relu_backward(const CudaRuntime& runtime, Dtype dtype, const ImageShape& shape,
                      Activation activation, const void* grad, const void* input,
                      const void* affine, bool frozen, const void* residual, void* g, void* sums);
void preact_conv_forward(const CudaRuntime& runtime, const PreactConvForward& op);
void preact_conv_dgrad(const CudaRuntime& runtime, const PreactConvDgrad& op);
void preact_conv_wgrad(const CudaRuntime& runtime, const PreactConvWgrad& op);
void add_splits(const CudaRuntime& runtime, int64_t count, const SplitSum* sums);
void preact_conv_backward(const CudaRuntime& runtime, const PreactConvDgrad& dgrad,
                          const PreactConvWgrad& wgrad);
void residual_grad(const CudaRuntime& runtime, Dtype dtype, const ImageShape& shape,
                   const void* grad, const void* g, const void* input, const void* affine,
                   const void* sums, void* dinput);

}  // namespace preact
