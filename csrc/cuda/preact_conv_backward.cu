// preact_conv_backward: g, S1, S2 and dW of one convolution, as in preact_conv_dgrad and
// preact_conv_wgrad.
//
// A 1x1 that moves no pixel, in 16 bits, has one kernel for both where dW [K, C] is small enough to
// stay in registers: K <= 64 and C <= 256, or K <= 256 and C <= 64.
// Reads g', u' [M, K] once for each 128 input channels (from the cache after the first), u, addend
// [M, C], the weights; writes g [M, C] and `splits` partial results of K*C floats. FLOPs
// 4*M*K*C. Of a residual sum it reads the gradient of its shortcut [M, K] as it does g', and writes
// dy [M, K].
// All others run wgrad and dgrad one after the other: each reads g', u' and u for itself. Before
// them residual_grad makes a residual sum's dy.
//
// A block has the gradients of up to 128 input channels for every splits-th tile of 32 pixels. In
// shared memory lie its weights and, of some tiles at the same time, dy, u and h.
#include "../residual_sum.h"
#include "conv.cuh"

namespace preact {
namespace cuda {
namespace {

constexpr int kPixels = 32;     // of a tile
constexpr int kStageRows = 16;  // of g, by a warp

// Of dW a warp has up to 32 by 32 channels, kWarpsDown of them next to one another along the
// inputs; of g 16 pixels by a share of the inputs. Registers are spared for kBlocks blocks of a
// multiprocessor.
template <int kWarps_, int kWarpsDown_, int kBlocks_>
struct BackwardTile {
  static constexpr int kWarps = kWarps_, kThreads = 32 * kWarps, kWarpsDown = kWarpsDown_;
  static constexpr int kBlocks = kBlocks_;
  static constexpr int kInputs = 32 * kWarpsDown, kOutputs = 32 * (kWarps / kWarpsDown);
  static constexpr int kGradWarps = kWarps / 2;  // next to one another
  static constexpr int kGradChannels = std::max(kInputs / kGradWarps, 16);
  // 8 floats are left free, so that mma's layout does not meet in a bank.
  static constexpr int kResultPitch = kGradChannels + 8;
};
using SmallTile = BackwardTile<4, 2, 4>;    // 64 inputs, 64 outputs
using InputsTile = BackwardTile<8, 4, 2>;   // 128, 64
using OutputsTile = BackwardTile<8, 2, 2>;  // 64, 128
using WidestTile = BackwardTile<16, 2, 1>;  // 64, 256

// What a block does, and where things lie in its shared memory, in bytes from its start. Rows of
// channels are a piece longer than the channels, so that ldmatrix finds eight in different banks.
struct BackwardTiling {
  int64_t pixels;                       // M
  int input_pitch, output_pitch;        // elements from row to row
  int input_bn_pitch, output_bn_pitch;  // floats from vector to vector of BatchNorm
  int input_span, output_span;          // channels of a warp of dW
  int grad_span;                        // input channels of a warp of g
  int stages;                           // tiles that are copied or multiplied at the same time
  int64_t input_bn, output_bn, weights, activated, result, inputs, grads, second, third, total;
};

// Where dy is that of a residual sum.
template <typename T>
struct ResidualSum {
  const T* residual;  // [M, K] or null
  T* dy;              // [M, K] or null
};

// How the threads of a block share rows of channels: each has a column of pieces, and every step-th
// row from the first one on.
template <int kThreads>
struct Rows {
  int column, first, step;

  PREACT_DEVICE explicit Rows(int channels) {
    const int pieces = channels / kPiece, thread = static_cast<int>(threadIdx.x);
    column = thread % pieces * kPiece;
    step = kThreads / pieces;
    first = thread / pieces < step ? spread(thread / pieces, pieces) : kPixels;
  }
  // Eight threads are one pass over the banks: rows of two or four pieces that meet in one have to
  // lie as many apart.
  PREACT_DEVICE static int spread(int row, int pieces) {
    if (pieces != 2 && pieces != 4) return row;
    const int in_pass = 8 / pieces;
    return row / 8 * 8 + row % in_pass * pieces + row % 8 / in_pass;
  }
};

// Starts the copies of a tile of which `pixels` are there; the rows of the others are zero.
template <typename T, class Rows>
PREACT_DEVICE void fetch_rows(const Rows& rows, const T* from, int64_t channels, int pixels,
                              int pitch, T* to) {
#pragma unroll 1
  for (int row = rows.first; row < kPixels; row += rows.step)
    copy_piece(to + row * pitch + rows.column, from + row * channels + rows.column, row < pixels);
}

template <typename T, Activation kActivation, class Tile>
__global__ __launch_bounds__(Tile::kThreads, Tile::kBlocks) void preact_conv_backward_kernel(
    const BackwardTiling tiling, const Gradient<T> grad, const ResidualSum<T> sum,
    const Channels input_channels, const T* input, const float* affine, const Weight weight,
    const T* addend, T* g,
    float* partial,  // [splits, K, C]
    const ReductionMemory memory,
    float* sums) {  // [2, C] or null
  const int c = static_cast<int>(input_channels.count);
  const int outputs = static_cast<int>(grad.channels.count);
  const int first_channel = static_cast<int>(blockIdx.y) * Tile::kInputs;
  const int inputs = c - first_channel < Tile::kInputs ? c - first_channel : Tile::kInputs;
  const int input_pitch = tiling.input_pitch, output_pitch = tiling.output_pitch;
  const bool deferred = !grad.plain();

  unsigned char* const shared = shared_memory();
  float* const input_bn = reinterpret_cast<float*>(shared + tiling.input_bn);
  float* const output_bn = reinterpret_cast<float*>(shared + tiling.output_bn);
  T* const weights = reinterpret_cast<T*>(shared + tiling.weights);
  const auto activated_at = [&](int tile) {
    return reinterpret_cast<T*>(shared + tiling.activated) + tile % 2 * kPixels * input_pitch;
  };
  const auto input_at = [&](int slot) {
    return reinterpret_cast<T*>(shared + tiling.inputs) + slot * kPixels * input_pitch;
  };
  const auto grad_at = [&](int slot) {
    return reinterpret_cast<T*>(shared + tiling.grads) + slot * kPixels * output_pitch;
  };
  const auto second_at = [&](int slot) {
    return reinterpret_cast<T*>(shared + tiling.second) + slot * kPixels * output_pitch;
  };
  const auto third_at = [&](int slot) {
    return reinterpret_cast<T*>(shared + tiling.third) + slot * kPixels * output_pitch;
  };

  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = warp_number();
  using BlockRows = Rows<Tile::kThreads>;
  const BlockRows input_rows(inputs), output_rows(outputs);
  const int64_t all_tiles = (tiling.pixels + kPixels - 1) / kPixels;
  const int splits = static_cast<int>(gridDim.x);
  const int tiles = static_cast<int>((all_tiles - blockIdx.x + splits - 1) / splits);
  const auto first_pixel = [&](int tile) {
    return (blockIdx.x + int64_t{tile} * splits) * kPixels;
  };
  const auto pixels_of = [&](int tile) {
    const int64_t left = tiling.pixels - first_pixel(tile);
    return left < kPixels ? static_cast<int>(left) : kPixels;
  };
  // Starts the copies of a tile: one group each, empty behind the last one.
  const auto fetch = [&](int tile, int slot, int second) {
    if (tile < tiles) {
      const int64_t first = first_pixel(tile);
      const int pixels = pixels_of(tile);
      const auto fetch_outputs = [&](const T* from, T* to) {
        fetch_rows(output_rows, from + first * outputs, outputs, pixels, output_pitch, to);
      };
      fetch_outputs(grad.first, grad_at(slot));
      if (deferred) fetch_outputs(grad.output, second_at(second));
      if (sum.residual) fetch_outputs(sum.residual, third_at(second));
      fetch_rows(input_rows, input + first * c + first_channel, c, pixels, input_pitch,
                 input_at(slot));
    }
    copies_commit();
  };

  for (int row = 0; row < outputs; row += kPixels)
    fetch_rows(input_rows,
               static_cast<const T*>(weight.data) + row * weight.stride_k + first_channel,
               weight.stride_k, outputs - row, input_pitch, weights + row * input_pitch);
  const int copied = tiling.stages - 1;  // tiles
  for (int tile = 0; tile < copied; ++tile) fetch(tile, tile, tile);
  for (int i = thread * kPiece; i < inputs; i += Tile::kThreads * kPiece) {
    const Affine bn(affine, input_channels, first_channel + i);
    bn.write(input_bn + spaced(i), tiling.input_bn_pitch);
  }
  for (int i = thread * kPiece; deferred && i < outputs; i += Tile::kThreads * kPiece) {
    const BnGrad<T> bn(grad.affine, grad.sums, grad.inverse_count, grad.channels, i);
    bn.write(output_bn + spaced(i), tiling.output_bn_pitch);
  }
  __syncthreads();

  // of dW
  constexpr int kM = 2, kN = 4;
  const int warp_input = warp % Tile::kWarpsDown * tiling.input_span;
  const int warp_output = warp / Tile::kWarpsDown * tiling.output_span;
  const auto at_most = [](int left, int span) { return left < span ? left : span; };
  const int live_inputs = at_most(inputs - warp_input, tiling.input_span);
  const int live_outputs = at_most(outputs - warp_output, tiling.output_span);
  float dweight[kM][kN][4] = {};
  // of g
  const int warp_pixel = warp % 2 * kStageRows, warp_channel = warp / 2 * tiling.grad_span;
  const int live = at_most(inputs - warp_channel, tiling.grad_span);
  const int pieces = tiling.grad_span / kPiece, rows = 32 / pieces;
  const int my_channel = warp_channel + lane % pieces * kPiece;
  const int my_row = lane / pieces < rows && my_channel < inputs
                         ? BlockRows::spread(lane / pieces, pieces)
                         : kStageRows;
  float* const result =
      reinterpret_cast<float*>(shared + tiling.result) + warp * kStageRows * Tile::kResultPitch;
  PieceSums reduced;

  int slot = 0, second = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    const int pixels = pixels_of(tile);
    T* const dy = grad_at(slot);
    const T* const u = input_at(slot);
    T* const h = activated_at(tile);
    copies_wait(tiling.stages - 2);
    if (deferred) {
#pragma unroll 1
      for (int row = output_rows.first; row < pixels; row += output_rows.step) {
        // read for each row: kept over them, its registers would be spilled
        const auto bn =
            BnGrad<T>::read(output_bn + spaced(output_rows.column), tiling.output_bn_pitch);
        const int at = row * output_pitch + output_rows.column;
        Piece v, other;
        read_piece(dy + at, v);
        read_piece(second_at(second) + at, other);
#pragma unroll
        for (int j = 0; j < kPiece; ++j) v[j] = bn.du(j, v[j], other[j]);
        if (sum.residual) {
          read_piece(third_at(second) + at, other);
#pragma unroll
          for (int j = 0; j < kPiece; ++j) v[j] += other[j];
        }
        write_piece(dy + at, v);
        if (sum.dy && blockIdx.y == 0)
          store_piece(sum.dy + (first_pixel(tile) + row) * outputs + output_rows.column, kPiece,
                      true, v);
      }
    }
    {
      const Affine bn = Affine::read(input_bn + spaced(input_rows.column), tiling.input_bn_pitch);
#pragma unroll 1
      for (int row = input_rows.first; row < kPixels; row += input_rows.step) {
        const int at = row * input_pitch + input_rows.column;
        Piece v;
        read_piece(u + at, v);
        RawPiece<T> operand{};
        if (row < pixels) operand = bn.template activated<kActivation, T>(v);
        write_raw_piece(h + at, operand);
      }
    }
    __syncthreads();
    fetch(tile + copied, slot > 0 ? slot - 1 : copied, second);  // where everybody has finished
    slot = next_slot(slot, tiling.stages);
    second = next_slot(second, copied);

    if (live_inputs > 0 && live_outputs > 0) {
#pragma unroll
      for (int p0 = 0; p0 < kPixels; p0 += 16)
        multiply<T, true, true>(
            dweight, live_outputs,
            [&](int m, int i, int p) {
              return h + (p0 + p) * input_pitch + warp_input + 16 * m + i;
            },
            [&](int n, int p) { return dy + (p0 + p) * output_pitch + warp_output + n; });
    }
    if (live <= 0) continue;
    float dh[1][Tile::kGradChannels / 8][4] = {};
#pragma unroll 1
    for (int k0 = 0; k0 < outputs; k0 += 16)
      multiply<T, false, true>(
          dh, live,
          [&](int m, int i, int k) {
            return dy + (warp_pixel + 16 * m + i) * output_pitch + k0 + k;
          },
          [&](int n, int k) { return weights + (k0 + k) * input_pitch + warp_channel + n; });
    __syncwarp();  // the results before have been read
#pragma unroll
    for (int n = 0; n < Tile::kGradChannels / 8; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h)
        store_shared(reinterpret_cast<float2*>(result + (8 * h + lane / 4) * Tile::kResultPitch +
                                               8 * n + lane % 4 * 2),
                     make_float2(dh[0][n][2 * h], dh[0][n][2 * h + 1]));
    __syncwarp();
#pragma unroll 1
    for (int row = my_row; row < kStageRows; row += rows) {
      if (warp_pixel + row >= pixels) continue;
      const int64_t to = (first_pixel(tile) + warp_pixel + row) * c + first_channel + my_channel;
      Piece v, of_input;
      read_piece(result + row * Tile::kResultPitch + my_channel - warp_channel, v);
      read_piece(u + (warp_pixel + row) * input_pitch + my_channel, of_input);
      const Affine bn = Affine::read(input_bn + spaced(my_channel), tiling.input_bn_pitch);
      if (addend) {
        Piece added;
        load_piece(addend + to, kPiece, true, added);
#pragma unroll
        for (int j = 0; j < kPiece; ++j) v[j] += added[j];
      }
#pragma unroll
      for (int j = 0; j < kPiece; ++j) v[j] *= slope<kActivation>(bn.z(j, of_input[j]));
      store_piece(g + to, kPiece, true, v);
      round_piece<T>(v);
      reduced.add(v, of_input, bn.mean);
    }
  }

#pragma unroll
  for (int m = 0; m < kM; ++m)
#pragma unroll
    for (int n = 0; n < kN; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 16 * m + i / 2 * 8 + lane / 4, column = 8 * n + lane % 4 * 2 + i % 2;
        if (row < live_inputs && column < live_outputs)
          store(partial + (int64_t{blockIdx.x} * outputs + warp_output + column) * c +
                    first_channel + warp_input + row,
                dweight[m][n][i]);
      }

  if (!memory.partial) return;
  const Reduction reduction{memory.partial,
                            memory.tickets + blockIdx.y * tickets_of(splits),
                            c,
                            splits,
                            static_cast<int>(blockIdx.x),
                            first_channel,
                            inputs};
  const int my_sums = my_row < kStageRows ? warp % 2 * rows + lane / pieces : 2 * rows;
  reduce(reduction, reduced, my_channel / kPiece, my_sums, 2 * rows,
         reinterpret_cast<float*>(shared + tiling.inputs), [&](int64_t i, const Sums& total) {
           store(sums + i, total.s1);
           store(sums + c + i, total.s2 * load(affine + c + i));
         });
}

// Channels of each of `warps`, in multiples of what mma takes.
int span(int64_t channels, int warps) {
  return static_cast<int>(ceil_div(channels, 16 * warps) * 16);
}

// Where a block's things lie, for so many stages.
template <class Tile>
BackwardTiling lay_out(const PreactConvDgrad& op, int stages) {
  const int64_t c = op.shape.input.channels, k = op.shape.output.channels;
  const int64_t inputs = std::min<int64_t>(c, Tile::kInputs);
  constexpr int64_t kBytes = sizeof(bf16), kFloat = sizeof(float);
  BackwardTiling t{};
  t.pixels = op.shape.input.pixels();
  t.input_pitch = pitch<bf16>(static_cast<int>(inputs), true);
  t.output_pitch = pitch<bf16>(static_cast<int>(k), true);
  t.input_bn_pitch = spaced(static_cast<int>(inputs));
  t.output_bn_pitch = spaced(static_cast<int>(k));
  t.input_span = span(inputs, Tile::kWarpsDown);
  t.output_span = span(k, Tile::kWarps / Tile::kWarpsDown);
  t.grad_span = span(inputs, Tile::kGradWarps);
  t.stages = stages;
  const int64_t input_bytes = kPixels * t.input_pitch * kBytes;
  const int64_t output_bytes = kPixels * t.output_pitch * kBytes;
  t.output_bn = t.input_bn + Affine::kRows * t.input_bn_pitch * kFloat;
  t.weights = t.output_bn + (op.grad.output ? BnGrad<bf16>::kRows * t.output_bn_pitch * kFloat : 0);
  t.activated = t.weights + ceil_div(k, kPixels) * input_bytes;
  t.result = t.activated + 2 * input_bytes;
  t.inputs = t.result + Tile::kWarps * kStageRows * Tile::kResultPitch * kFloat;
  t.grads = t.inputs + stages * input_bytes;
  t.second = t.grads + stages * output_bytes;
  t.third = t.second + (op.grad.output ? stages - 1 : 0) * output_bytes;
  const int rows = 2 * (32 / (t.grad_span / kPiece));
  // The reduction comes when nobody needs the tiles any more.
  t.total =
      std::max(t.third + (op.grad.residual ? stages - 1 : 0) * output_bytes,
               t.inputs + reduce_floats(Sums::kValues, rows, inputs, Tile::kThreads) * kFloat);
  return t;
}

template <typename T, Activation kActivation, class Tile>
void run(const CudaRuntime& runtime, const PreactConvDgrad& op, void* dweight) {
  const int64_t pixels = op.shape.input.pixels();
  const int64_t c = op.shape.input.channels, k = op.shape.output.channels;
  const int64_t groups = ceil_div(c, Tile::kInputs);
  constexpr int64_t kBytes = sizeof(T), kFloat = sizeof(float);
  const auto kernel = preact_conv_backward_kernel<T, kActivation, Tile>;
  constexpr int64_t kAny = std::numeric_limits<int64_t>::max();
  const BackwardTiling tiling =
      lay_out<Tile>(op, choose_stages(runtime, kernel, Tile::kThreads, kAny,
                                      [&](int stages) { return lay_out<Tile>(op, stages).total; }));

  const int64_t resident = resident_blocks(kernel, Tile::kThreads, tiling.total, runtime.device) *
                           multiprocessors(runtime.device);
  const int64_t tiles = ceil_div(pixels, kPixels);
  const int64_t of_output = 1 + (op.grad.output ? 1 : 0) + (op.grad.residual ? 2 : 0);  // tensors
  const int64_t moved = pixels * (2 * c + of_output * k) * kBytes;
  const int64_t most = choose_splits(resident / groups, moved, k * c * kFloat, tiles);
  const int64_t splits = ceil_div(tiles, ceil_div(tiles, most));  // none has fewer to do
  float* const partial =
      static_cast<float*>(runtime.allocate_partial(splits * k * c * kFloat, runtime.context));
  ReductionMemory memory;
  if (op.sums) memory = {runtime, Sums::kValues, splits, c, groups};
  const ResidualSum<T> sum{static_cast<const T*>(op.grad.residual), static_cast<T*>(op.grad.dy)};
  launch("preact_conv_backward", kernel,
         {static_cast<unsigned>(splits), static_cast<unsigned>(groups)}, Tile::kThreads,
         tiling.total, runtime.device, runtime.stream, tiling,
         Gradient<T>(op.grad, op.shape.output), sum, channels_of(c, {}),
         static_cast<const T*>(op.input), static_cast<const float*>(op.affine), op.weight,
         static_cast<const T*>(op.addend), static_cast<T*>(op.g), partial, memory,
         static_cast<float*>(op.sums));
  runtime.sum_partial({partial, static_cast<float*>(dweight), splits, 1, k, c}, runtime.context);
}

// Calls f<Tile>() with the tile of a convolution.
template <typename F>
auto dispatch_tile(const PreactConvDgrad& op, const F& f) {
  const int64_t c = op.shape.input.channels, k = op.shape.output.channels;
  if (k > OutputsTile::kOutputs) return f.template operator()<WidestTile>();
  if (k > SmallTile::kOutputs) return f.template operator()<OutputsTile>();
  if (c > SmallTile::kInputs) return f.template operator()<InputsTile>();
  return f.template operator()<SmallTile>();
}

// Whether the kernel has such a convolution, all that it reads and writes are vectors, and the
// device has as much shared memory.
bool in_one_kernel(const CudaRuntime& runtime, const PreactConvDgrad& op) {
  const int64_t c = op.shape.input.channels, k = op.shape.output.channels;
  const auto fits = [&](int64_t most_outputs, int64_t most_inputs) {
    return k <= most_outputs && c <= most_inputs;
  };
  const bool two_bytes = op.dtype == Dtype::kBFloat16 || op.dtype == Dtype::kFloat16;
  const OutputGrad& dy = op.grad;
  return two_bytes && is_pointwise(op.shape) && op.affine && !op.frozen && c % 16 == 0 &&
         k % 16 == 0 &&
         (fits(InputsTile::kOutputs, 256) || fits(WidestTile::kOutputs, WidestTile::kInputs)) &&
         channels_of(c, {op.input, op.affine, op.addend, op.g}).vectors &&
         channels_of(k, {dy.grad, dy.output, dy.affine, dy.sums, dy.residual, dy.dy}).vectors &&
         weight_channels(op.weight, c).vectors &&
         dispatch_tile(op, [&]<class Tile>() { return lay_out<Tile>(op, 2).total; }) <=
             most_shared_bytes(runtime.device);
}

template <typename T>
void run_activation(const CudaRuntime& runtime, const PreactConvDgrad& op, void* dweight) {
  dispatch_activation<T>(op.activation, [&]<typename U, Activation kActivation>() {
    dispatch_tile(op, [&]<class Tile>() { run<U, kActivation, Tile>(runtime, op, dweight); });
  });
}

}  // namespace
}  // namespace cuda

void preact_conv_backward(const CudaRuntime& runtime, const PreactConvDgrad& dgrad,
                          const PreactConvWgrad& wgrad) {
  const bool together = cuda::in_one_kernel(runtime, dgrad);
  if (dgrad.grad.dy && !together) return backward_after_residual_grad(runtime, dgrad, wgrad);
  if (!together) {
    preact_conv_wgrad(runtime, wgrad);
    preact_conv_dgrad(runtime, dgrad);
  } else if (dgrad.dtype == Dtype::kBFloat16) {
    cuda::run_activation<bf16>(runtime, dgrad, wgrad.dweight);
  } else {
    cuda::run_activation<cuda::f16>(runtime, dgrad, wgrad.dweight);
  }
}

}  // namespace preact
