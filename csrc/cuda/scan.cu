#include "scan.cuh"

namespace rk {
namespace cuda {
namespace {

// 1024 positions a chunk: the rows of a batch of 512 are resident on an H200 all at once.
constexpr int kBlockThreads = 256;

template <class T, Holes kHoles>
void launch(const Gae& args, cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>(args.rows)), threads(kBlockThreads);
  if (args.mask)
    gae_kernel<T, kHoles, true, kBlockThreads><<<blocks, threads, 0, stream>>>(args);
  else  // without a mask there are no holes to tell apart
    gae_kernel<T, Holes::kSkip, false, kBlockThreads><<<blocks, threads, 0, stream>>>(args);
}

template <class T>
void launch_holes(const Gae& args, Holes holes, cudaStream_t stream) {
  switch (holes) {
    case Holes::kSkip:
      return launch<T, Holes::kSkip>(args, stream);
    case Holes::kStop:
      return launch<T, Holes::kStop>(args, stream);
    case Holes::kZero:
      return launch<T, Holes::kZero>(args, stream);
  }
}

}  // namespace

const char* gae(const Gae& args, Dtype dtype, Holes holes, void* stream) {
  if (args.rows <= 0) return nullptr;
  if (args.rows > INT32_MAX) return "more than 2^31 - 1 sequences in one call";
  cudaStream_t queue = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case Dtype::kFloat32:
      launch_holes<float>(args, holes, queue);
      break;
    case Dtype::kFloat16:
      launch_holes<__half>(args, holes, queue);
      break;
    case Dtype::kBFloat16:
      launch_holes<__nv_bfloat16>(args, holes, queue);
      break;
  }
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace rk
