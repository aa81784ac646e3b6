// The logits product of the output layer, reduced where it is made.
//
// CUTLASS's persistent, warp-specialised kernel makes tiles of logits: one warp loads operands by
// TMA, multicast over a cluster of two blocks, warpgroups multiply, and HeadEpilogue takes the place
// of the store.
#pragma once

#include <cutlass/epilogue/collective/detail.hpp>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "cuda_operators.h"
#include "head_epilogue.cuh"
#include "head_tiles.h"

namespace flowrl::cuda {

template <class Tiles, bool kStore, bool kScaled>
struct HeadGemm {
  using Element = typename Tiles::Element;
  using Epilogue = cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<
      HeadEpilogue<kStore, kScaled>>;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>,
                                                      Mainloop<Tiles>, Epilogue>;
  using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
  static_assert(Kernel::SharedStorageSize <= 227 << 10, "what a block of Hopper has");

  static const char* run(const HeadForward& call, Stream stream_pointer) {
    auto* stream = static_cast<cudaStream_t>(stream_pointer);
    cutlass::KernelHardwareInfo hardware;
    if (cudaGetDevice(&hardware.device_id) != cudaSuccess) return "found no CUDA device";
    hardware.sm_count =
        cutlass::KernelHardwareInfo::query_device_multiprocessor_count(hardware.device_id);
    const auto stride = [](int64_t row) { return cute::make_stride(row, cute::_1{}, int64_t{0}); };
    typename Device::Arguments arguments{
        cutlass::gemm::GemmUniversalMode::kGemm,
        {call.num_rows, call.num_columns, call.dim, 1},
        {static_cast<const Element*>(call.hidden), stride(call.hidden_stride),
         static_cast<const Element*>(call.weight), stride(call.weight_stride)},
        call,
        hardware};
    using Order = decltype(arguments.scheduler.raster_order);
    const auto blocks = [](int64_t count, int tile) { return (count + tile - 1) / tile; };
    const bool rows_stay =
        int64_t{call.num_rows} * call.dim * int64_t{sizeof(Element)} <= kRowBytesInL2;
    arguments.scheduler.raster_order = rows_stay ? Order::AlongM : Order::AlongN;
    arguments.scheduler.max_swizzle_size =
        rows_stay ? 1
                  : swizzle(blocks(call.num_rows, cute::size<0>(typename Tiles::Shape{})),
                            blocks(call.num_columns, cute::size<1>(typename Tiles::Shape{})));
    Device device;
    cutlass::Status status = device.can_implement(arguments);
    if (status == cutlass::Status::kSuccess) status = device.initialize(arguments, nullptr, stream);
    if (status == cutlass::Status::kSuccess) status = device.run(stream);
    return status == cutlass::Status::kSuccess ? nullptr : cutlassGetStatusString(status);
  }
};

}  // namespace flowrl::cuda
