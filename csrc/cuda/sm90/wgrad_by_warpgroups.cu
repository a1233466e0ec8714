// preact_conv_wgrad by wgmma:
//   dW[k, c, r, s] = sum over pixels of dy[p, k] * h[p at tap (r, s), c],
//   dy = scale' * g' + B' * (u' - mean') + C' of the layer above, h = act(scale * (u - mean) +
//   shift).
// Reads g', u' [M', K] once for each 64 to 256 input channels, u [M, C] once for each 64 to 256
// output channels with the halo of its tiles (from the cache after the first), writes `splits`
// partial results of K*C*R*S floats. FLOPs 2*M'*K*C*R*S.
//
// The products sum over positions of the line, where dy is zero wherever there is no pixel: a tap
// of h is the same window, begun elsewhere. A warpgroup has a row of a 3x3 kernel, its three taps
// of 64 outputs by 64 inputs; or of a 1x1 64 outputs by 128 inputs. While the products of a tile
// are under way, which take no instructions, all threads fill the windows of the next one.
// add_splits() adds the splits up, in a fixed order.
#include "choose.cuh"

namespace preact::cuda {
namespace {

// What a tile is made of: warpgroups that multiply, down times 64 outputs by across times
// group_inputs inputs, for each of as many rows of the kernel as it has taps in one.
struct WgradShape {
  int down = 1, across = 1;
  int taps = 1;
  int group_inputs = 128;
  int positions = 128;    // of a window
  int grads_at_once = 1;  // pieces of dy that a thread has on their way
  int stride = 1;         // with 2, a 3x3 has a window of h for each phase
};

template <WgradShape kShape>
struct WgradGroups {
  static constexpr int kDown = kShape.down, kTaps = kShape.taps, kPositions = kShape.positions;
  static constexpr int kGroupInputs = kShape.group_inputs;
  static constexpr int kInputs = kShape.across * kGroupInputs;
  static constexpr int kStride = kShape.stride, kAxisPhases = std::min(kStride, kTaps);
  static constexpr int kGradsAtOnce = kShape.grads_at_once;
  static constexpr int kInputsAtOnce = 4;  // pieces of h
  static constexpr int kGap = (kTaps / 2 + kStride - 1) / kStride;
  // Along an axis: a tap's phase, and where in that its source lies, from a result.
  PREACT_DEVICE static constexpr int phase_of(int tap) { return (tap + kTaps / 2) % kStride; }
  PREACT_DEVICE static constexpr int source_of(int tap) {
    return (tap - kTaps / 2 - phase_of(tap)) / kStride;
  }
  static constexpr int kOutputs = kDown * kProductRows;
  static constexpr int kThreads = kDown * kShape.across * kTaps * kWarpgroup;
  // Of BatchNorm's vectors in shared memory, which a thread reads once for each window: its
  // channels are the same in all of them.
  static constexpr int kGradPitch = spaced(kOutputs), kInputPitch = spaced(kInputs);
  static constexpr int kGradFloats = BnGrad<bf16>::kRows * kGradPitch;
  static constexpr int kInputFloats = Affine::kRows * kInputPitch;
};
// Types of their own, so that a kernel's name says which one is its.
struct RowWgrad : WgradGroups<WgradShape{.taps = 3, .group_inputs = 64, .positions = 256}> {};
struct PointWgrad : WgradGroups<WgradShape{.down = 2, .grads_at_once = 2}> {};
struct TallPointWgrad : WgradGroups<WgradShape{.down = 4}> {};
struct WidePointWgrad : WgradGroups<WgradShape{.down = 2, .across = 2}> {};
struct StridedRowWgrad : WgradGroups<WgradShape{.taps = 3, .group_inputs = 64, .stride = 2}> {};
struct StridedPointWgrad : WgradGroups<WgradShape{.down = 4, .stride = 2}> {};

constexpr int kWgradSlots = 2;

struct WgradLine {
  ConvLine conv;
  int tiles, splits;
  int outputs, inputs;              // K, C
  int output_pieces, input_pieces;  // that threads share, as many as there are, or a power of 2
  int grad_share, input_share;      // positions of a window that a warp fills at a time
  int grad_plane, input_plane, input_at, input_phase, slot, vectors_at;  // bytes
  int64_t shared_bytes;
};

template <typename T, class Tile>
__global__ __launch_bounds__(Tile::kThreads, 1) void wgrad_by_warpgroups_kernel(
    const WgradLine t, Gradient<T> grad, Activated<T, false> input,
    float* partial) {  // [splits, R * S, K, C]
  // As the host has made sure; known here, it spares the code of single numbers.
  grad.channels.vectors = input.channels.vectors = true;
  constexpr int kTaps = Tile::kTaps;
  const int warp = warp_number();
  const int tiles_across = (t.inputs + Tile::kInputs - 1) / Tile::kInputs;
  const int first_output = static_cast<int>(blockIdx.y) / tiles_across * Tile::kOutputs;
  const int first_input = static_cast<int>(blockIdx.y) % tiles_across * Tile::kInputs;
  ConvLine conv = t.conv;
  conv.stride = Tile::kStride, conv.kernel = kTaps;  // known here, spares code
  conv.line.gap = Tile::kGap;
  const Line& line = conv.line;
  const int split = static_cast<int>(blockIdx.x), lead = line.diagonal(conv.before());
  const int window_positions = Tile::kPositions + lead + line.diagonal(conv.behind());
  // Warps that have one share more of dy have one less of h.
  const int from_behind = Tile::kThreads / 32 - 1 - warp;
  float* const grad_bn = reinterpret_cast<float*>(shared_memory() + t.vectors_at);
  float* const input_bn = grad_bn + Tile::kGradFloats;
  const auto keep = [&](const auto& operand, int first_channel, int channels, float* rows) {
    const int i = static_cast<int>(threadIdx.x) * kPiece;
    if (!operand.plain() && i < channels)
      operand.vectors(first_channel + i).write(rows + spaced(i), spaced(channels));
  };
  keep(grad, first_output, Tile::kOutputs, grad_bn);
  keep(input, first_input, Tile::kInputs, input_bn);
  __syncthreads();
  const auto grad_vectors = [&](int channel) {
    return BnGrad<T>::read(grad_bn + spaced(channel - first_output), Tile::kGradPitch);
  };
  const auto input_vectors = [&](int channel) {
    return Affine::read(input_bn + spaced(channel - first_input), Tile::kInputPitch);
  };
  const auto fill = [&](int tile, unsigned char* window) {
    const int first = tile * Tile::kPositions;
    fill_window<T, Tile::kThreads / 32, Tile::kGradsAtOnce>(
        grad, grad_vectors, Run(line, conv.results(), first), Tile::kPositions, t.grad_share,
        first_output, t.output_pieces, 0, window, t.grad_plane, warp);
#pragma unroll 1
    for (int phase = 0; phase < Tile::kAxisPhases * Tile::kAxisPhases; ++phase)
      fill_window<T, Tile::kThreads / 32, Tile::kInputsAtOnce>(
          input, input_vectors, Run(line, conv.input(phase), first - lead), window_positions,
          t.input_share, first_input, t.input_pieces, 0,
          window + t.input_at + phase * t.input_phase, t.input_plane, from_behind);
  };

  const int group = warp / 4, row = group % kTaps;  // of the kernel
  const int group_output = group / kTaps % Tile::kDown * kProductRows;
  const int group_input = group / kTaps / Tile::kDown * Tile::kGroupInputs;
  float sums[kTaps][Tile::kGroupInputs / 2] = {};
  unsigned char *window = shared_memory(), *next = window + t.slot;
  if (split < t.tiles) fill(split, window);
  for (int tile = split; tile < t.tiles; tile += t.splits) {
    __syncthreads();  // the window is filled, and the products of the one before are done
    const Operand dy(window + group_output / kPiece * t.grad_plane, kCore, t.grad_plane);
    // of the tap whose source lies farthest before
    const Operand h(window + t.input_at + group_input / kPiece * t.input_plane +
                        Tile::phase_of(row) * Tile::kAxisPhases * t.input_phase +
                        (lead + Tile::source_of(row) * line.pitch() - Tile::kGap) * kCoreRow,
                    kCore, t.input_plane);
    products_begin();
#pragma unroll
    for (int p = 0; p < Tile::kPositions; p += kProductDepth)
#pragma unroll
      for (int s = 0; s < kTaps; ++s)
        warpgroup_multiply<true, true>(sums[s], dy.moved(p * kCoreRow),
                                       h.moved(Tile::phase_of(s) * t.input_phase +
                                               (p + Tile::kGap + Tile::source_of(s)) * kCoreRow),
                                       true, T{});
    products_commit();
    if (tile + t.splits < t.tiles) fill(tile + t.splits, next);
    products_wait<0>();
    unsigned char* const filled = next;
    next = window;
    window = filled;
  }

  const int lane = lane_number();
#pragma unroll
  for (int s = 0; s < kTaps; ++s) {
    products_done(sums[s]);
    const int64_t plane = int64_t{split} * kTaps * kTaps + row * kTaps + s;
#pragma unroll
    for (int j = 0; j < Tile::kGroupInputs / 8; ++j)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int k = first_output + group_output + warp % 4 * 16 + 8 * h + lane / 4;
        const int c = first_input + group_input + 8 * j + lane % 4 * 2;
        if (k < t.outputs && c < t.inputs)
          store(reinterpret_cast<float2*>(partial + (plane * t.outputs + k) * t.inputs + c),
                make_float2(sums[s][4 * j + 2 * h], sums[s][4 * j + 2 * h + 1]));
      }
  }
}

// So many pieces do threads share, of a window that has room for `most`.
int shared_pieces(int64_t channels, int most) {
  int pieces = 2;
  while (pieces < most && pieces * kPiece < channels) pieces *= 2;
  return pieces;
}

template <class Tile>
WgradLine wgrad_line(const ConvShape& s) {
  WgradLine t{};
  t.conv = line_of(s);
  t.tiles = static_cast<int>(ceil_div(positions_of(s), Tile::kPositions));
  t.outputs = static_cast<int>(s.output.channels);
  t.inputs = static_cast<int>(s.input.channels);
  t.output_pieces = shared_pieces(t.outputs, Tile::kOutputs / kPiece);
  t.input_pieces = shared_pieces(t.inputs, Tile::kInputs / kPiece);
  constexpr int kWarps = Tile::kThreads / 32;
  t.grad_share = share_of_warp(Tile::kPositions, t.output_pieces, kWarps, Tile::kGradsAtOnce);
  const int around = t.conv.line.diagonal(t.conv.before() + t.conv.behind());
  t.input_share =
      share_of_warp(Tile::kPositions + around, t.input_pieces, kWarps, Tile::kInputsAtOnce);
  t.grad_plane = plane_bytes(Tile::kPositions, t.output_pieces);
  t.input_plane = plane_bytes(Tile::kPositions + around, t.input_pieces);
  t.input_at = t.grad_plane * (Tile::kOutputs / kPiece);
  t.input_phase = t.input_plane * (Tile::kInputs / kPiece);
  t.slot = t.input_at + t.input_phase * Tile::kAxisPhases * Tile::kAxisPhases;
  t.vectors_at = kWgradSlots * t.slot;
  t.shared_bytes = t.vectors_at + (Tile::kGradFloats + Tile::kInputFloats) * sizeof(float);
  return t;
}

template <class Tile>
bool run(const CudaRuntime& runtime, const PreactConvWgrad& op) {
  const ConvShape s = flattened(op.shape);
  const int64_t k = s.output.channels, c = s.input.channels, taps = Tile::kTaps * Tile::kTaps;
  WgradLine t = wgrad_line<Tile>(s);
  if (t.shared_bytes > most_shared_bytes(runtime.device)) return false;
  const auto with_dtype = [&]<typename T>() {
    const auto kernel = wgrad_by_warpgroups_kernel<T, Tile>;
    const int64_t channel_tiles = ceil_div(k, Tile::kOutputs) * ceil_div(c, Tile::kInputs);
    const int64_t partial_bytes = k * c * taps * static_cast<int64_t>(sizeof(float));
    const int64_t of_output = op.grad.output ? 2 : 1;  // tensors
    const int64_t moved = (s.input.pixels() * c + of_output * s.output.pixels() * k) *
                          static_cast<int64_t>(sizeof(T));
    t.splits = static_cast<int>(choose_splits(multiprocessors(runtime.device) / channel_tiles,
                                              moved, partial_bytes, t.tiles));
    float* const partial =
        static_cast<float*>(runtime.allocate_partial(t.splits * partial_bytes, runtime.context));
    const Activated<T, false> input{channels_of(c, {op.input, op.affine}),
                                    static_cast<const T*>(op.input),
                                    static_cast<const float*>(op.affine), op.activation};
    launch("preact_conv_wgrad", kernel,
           {static_cast<unsigned>(t.splits), static_cast<unsigned>(channel_tiles)}, Tile::kThreads,
           t.shared_bytes, runtime.device, runtime.stream, t, Gradient<T>(op.grad, s.output), input,
           partial);
    runtime.sum_partial({partial, static_cast<float*>(op.dweight), t.splits, taps, k, c},
                        runtime.context);
  };
  if (op.dtype == Dtype::kBFloat16)
    with_dtype.template operator()<bf16>();
  else
    with_dtype.template operator()<f16>();
  return true;
}

}  // namespace

bool wgrad_by_warpgroups(const CudaRuntime& runtime, const PreactConvWgrad& op) {
  const ConvShape& s = op.shape;
  if (!warpgroups_can(runtime, op.dtype, op.activation, s)) return false;
  if (!channels_of(s.input.channels, {op.input, op.affine}).vectors ||
      !Gradient<bf16>(op.grad, s.output).channels.vectors)
    return false;
  const bool strided = s.stride_height > 1;
  if (s.kernel_height == 1 && strided) return run<StridedPointWgrad>(runtime, op);
  if (s.kernel_height == 1) {
    if (s.output.channels > PointWgrad::kOutputs) return run<TallPointWgrad>(runtime, op);
    if (s.input.channels > PointWgrad::kInputs) return run<WidePointWgrad>(runtime, op);
    return run<PointWgrad>(runtime, op);
  }
  const bool few = s.input.channels <= kFewChannels && s.output.channels <= kFewChannels;
  if (s.kernel_height != RowWgrad::kTaps || few) return false;
  return strided ? run<StridedRowWgrad>(runtime, op) : run<RowWgrad>(runtime, op);
}

}  // namespace preact::cuda
