// Whether the driver can run what was built here. Asks for versions and devices only: no context is created.
#include <cuda_runtime.h>

#include "../kernels.h"

namespace privimage {
namespace cuda {

std::string problem() {
  int driver = 0, runtime = 0, devices = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || cudaRuntimeGetVersion(&runtime) != cudaSuccess || driver == 0)
    return "no CUDA driver was found";
  const auto text = [](int version) { return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10); };
  // Within one major version an older driver runs newer code.
  if (driver / 1000 < runtime / 1000)
    return "the kernels were built with CUDA " + text(runtime) + ", and the driver knows CUDA " + text(driver) +
           " at most; build with an older toolkit or update the driver";
  const cudaError_t error = cudaGetDeviceCount(&devices);
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace privimage
