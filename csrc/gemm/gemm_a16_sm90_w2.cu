// The Hopper GEMM with 16-bit activations for weights of 2 bits.
#ifndef LRQ_WITHOUT_SM90A
#include "instances_a16_sm90.cuh"

namespace lrq {

template cudaError_t launch_gemm_a16_sm90<2>(const A16Args&, cudaStream_t);

}  // namespace lrq
#endif
