// libcuda opened at run time, and what every library of native code for XLA needs around it.
//
// Functions are declared here, so that neither CUDA's headers nor its link library are needed. A
// library is one source file, which has all of this for itself.

#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct CUctx_st;
struct CUstream_st;
struct CUevent_st;
using CUcontext = CUctx_st*;
using CUstream = CUstream_st*;
using CUevent = CUevent_st*;
using CUdeviceptr = unsigned long long;
using CUresult = int;

constexpr CUresult kNotReady = 600;  // CUDA_ERROR_NOT_READY
constexpr unsigned kStreamNonBlocking = 1;
constexpr unsigned kEventTiming = 0;
constexpr unsigned kEventNoTiming = 2;
constexpr int kCaptureRelaxed = 2;  // CU_STREAM_CAPTURE_MODE_RELAXED

struct Cuda {
  CUresult (*Init)(unsigned);
  CUresult (*DeviceGet)(int*, int);
  CUresult (*PrimaryRetain)(CUcontext*, int);
  CUresult (*PrimaryRelease)(int);
  CUresult (*CtxPush)(CUcontext);
  CUresult (*CtxPop)(CUcontext*);
  CUresult (*PriorityRange)(int*, int*);
  CUresult (*StreamCreate)(CUstream*, unsigned, int);
  CUresult (*StreamDestroy)(CUstream);
  CUresult (*StreamQuery)(CUstream);
  CUresult (*StreamSynchronize)(CUstream);
  CUresult (*StreamWaitEvent)(CUstream, CUevent, unsigned);
  CUresult (*StreamWaitValue32)(CUstream, CUdeviceptr, uint32_t, unsigned);
  CUresult (*EventCreate)(CUevent*, unsigned);
  CUresult (*EventDestroy)(CUevent);
  CUresult (*EventRecord)(CUevent, CUstream);
  CUresult (*EventQuery)(CUevent);
  CUresult (*EventSynchronize)(CUevent);
  CUresult (*EventElapsed)(float*, CUevent, CUevent);
  CUresult (*MemsetD32)(CUdeviceptr, unsigned, size_t, CUstream);
  CUresult (*MemsetD8)(CUdeviceptr, unsigned char, size_t, CUstream);
  CUresult (*Copy)(CUdeviceptr, CUdeviceptr, size_t, CUstream);
  CUresult (*CopyToHost)(void*, CUdeviceptr, size_t, CUstream);
  CUresult (*HostAlloc)(void**, size_t, unsigned);
  CUresult (*HostFree)(void*);
  CUresult (*MemAlloc)(CUdeviceptr*, size_t);
  CUresult (*MemFree)(CUdeviceptr);
  CUresult (*ErrorName)(CUresult, const char**);
  CUresult (*ExchangeCaptureMode)(int*);
};

Cuda cuda;

inline void* open_library(const char* name) {
  // What is loaded already first: what XLA and cupy loaded is then also ours.
  void* handle = dlopen(name, RTLD_NOW | RTLD_NOLOAD);
  if (handle == nullptr) handle = dlopen(name, RTLD_NOW);
  if (handle == nullptr) throw Failure(std::string("cannot load ") + name + ": " + dlerror());
  return handle;
}

template <typename Function>
void find(void* library, const char* name, Function& function) {
  void* found = dlsym(library, name);
  if (found == nullptr) throw Failure(std::string(name) + " is missing: " + dlerror());
  static_assert(sizeof(found) == sizeof(function));
  std::memcpy(&function, &found, sizeof(found));
}

inline void check_cuda(CUresult result, const char* call) {
  if (result == 0) return;
  const char* name = nullptr;
  if (cuda.ErrorName(result, &name) != 0 || name == nullptr) name = "unknown error";
  throw Failure(std::string("CUDA: ") + call + " -> " + name);
}

#define CUDA(call) check_cuda(cuda.call, #call)

inline void load_cuda(const char* path) {
  void* library = open_library(path);
  find(library, "cuInit", cuda.Init);
  find(library, "cuDeviceGet", cuda.DeviceGet);
  find(library, "cuDevicePrimaryCtxRetain", cuda.PrimaryRetain);
  find(library, "cuDevicePrimaryCtxRelease_v2", cuda.PrimaryRelease);
  find(library, "cuCtxPushCurrent_v2", cuda.CtxPush);
  find(library, "cuCtxPopCurrent_v2", cuda.CtxPop);
  find(library, "cuCtxGetStreamPriorityRange", cuda.PriorityRange);
  find(library, "cuStreamCreateWithPriority", cuda.StreamCreate);
  find(library, "cuStreamDestroy_v2", cuda.StreamDestroy);
  find(library, "cuStreamQuery", cuda.StreamQuery);
  find(library, "cuStreamSynchronize", cuda.StreamSynchronize);
  find(library, "cuStreamWaitEvent", cuda.StreamWaitEvent);
  find(library, "cuStreamWaitValue32_v2", cuda.StreamWaitValue32);
  find(library, "cuEventCreate", cuda.EventCreate);
  find(library, "cuEventDestroy_v2", cuda.EventDestroy);
  find(library, "cuEventRecord", cuda.EventRecord);
  find(library, "cuEventQuery", cuda.EventQuery);
  find(library, "cuEventSynchronize", cuda.EventSynchronize);
  find(library, "cuEventElapsedTime", cuda.EventElapsed);
  find(library, "cuMemsetD32Async", cuda.MemsetD32);
  find(library, "cuMemsetD8Async", cuda.MemsetD8);
  find(library, "cuMemcpyAsync", cuda.Copy);
  find(library, "cuMemcpyDtoHAsync_v2", cuda.CopyToHost);
  find(library, "cuMemHostAlloc", cuda.HostAlloc);
  find(library, "cuMemFreeHost", cuda.HostFree);
  find(library, "cuMemAlloc_v2", cuda.MemAlloc);
  find(library, "cuMemFree_v2", cuda.MemFree);
  find(library, "cuGetErrorName", cuda.ErrorName);
  find(library, "cuThreadExchangeStreamCaptureMode", cuda.ExchangeCaptureMode);
  CUDA(Init(0));
}

// A device's primary context, which is XLA's, for as long as this lives.
class Current {
 public:
  explicit Current(CUcontext context) { CUDA(CtxPush(context)); }
  ~Current() {
    CUcontext popped;
    cuda.CtxPop(&popped);
  }
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
};

inline CUdeviceptr address(const void* pointer) { return reinterpret_cast<CUdeviceptr>(pointer); }

class EventPool {
 public:
  explicit EventPool(unsigned flags) : flags_(flags) {}
  CUevent take() {
    if (free_.empty()) {
      CUevent event;
      CUDA(EventCreate(&event, flags_));
      return event;
    }
    CUevent event = free_.back();
    free_.pop_back();
    return event;
  }
  void give(CUevent& event) {
    if (event != nullptr) free_.push_back(event);
    event = nullptr;
  }
  void clear() {
    for (CUevent event : free_) cuda.EventDestroy(event);
    free_.clear();
  }

 private:
  unsigned flags_;
  std::vector<CUevent> free_;
};

// For handlers: what they throw fails the step.
template <typename Work>
xla::ffi::Error guarded(const char* who, Work work) {
  try {
    work();
    return xla::ffi::Error::Success();
  } catch (const std::exception& error) {
    return xla::ffi::Error::Internal(std::string(who) + ": " + error.what());
  }
}

// For functions that Python calls: -1 on failure, and `message` says why, in the same thread.
thread_local std::string message;

template <typename Work>
int64_t reported(Work work) {
  try {
    return work();
  } catch (const std::exception& error) {
    message = error.what();
    return -1;
  }
}

}  // namespace
