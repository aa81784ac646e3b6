// linear_logprobs on Hopper: logits reduced where they are made, in bfloat16 and in e4m3.

#include "head_gemm.cuh"

namespace flowrl::cuda {

// Two warpgroups take tiles in turn: one multiplies while the other reduces. 192 columns: the
// widest tile whose accumulators leave registers for the reduction; a narrower one asks more of L2.
const char* head_forward(const HeadForward& call, Stream stream) {
  using Tile = cute::Shape<cute::_128, cute::Int<kTileColumns>, cute::_64>;
  return HeadGemm<cutlass::bfloat16_t, Tile, cutlass::gemm::KernelTmaWarpSpecializedPingpong, false,
                  false>::run(call, stream);
}

}  // namespace flowrl::cuda
