// The Hopper GEMM for weights of 2 bits.
#ifndef LRQ_WITHOUT_SM90A
#include "instances_sm90.cuh"

namespace lrq {

template cudaError_t launch_gemm_sm90_bits<2>(const GemmSm90Launch&, const GemmConfig&,
                                              cudaStream_t);

}  // namespace lrq
#endif
