// libcuda and libnccl on a CPU, as far as native code calls them: streams are threads, device
// memory is host memory, collectives are done by the last rank to arrive. Calls are written down as
// they are made, and faults can be put in. And a "GEMM" for XLA's CPU that signals its groups.

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Clock = std::chrono::steady_clock;

namespace {

std::mutex log_mutex;
std::vector<std::string> entries;
std::string joined;
std::map<std::string, int64_t> settings;

void note(const std::string& text) {
  std::lock_guard<std::mutex> lock(log_mutex);
  entries.push_back(text);
}

int64_t setting(const std::string& name) {
  std::lock_guard<std::mutex> lock(log_mutex);
  auto found = settings.find(name);
  return found == settings.end() ? -1 : found->second;
}

bool spent(const std::string& name) {  // counts down to the call that is to fail
  std::lock_guard<std::mutex> lock(log_mutex);
  auto found = settings.find(name);
  if (found == settings.end() || found->second < 0) return false;
  return found->second-- == 0;
}

void nap() { std::this_thread::sleep_for(std::chrono::microseconds(200)); }

std::atomic<int64_t> made_events{0};
std::atomic<int64_t> held{0};  // streams and memory that nobody has given back

struct Event {
  std::atomic<int64_t> recorded{0}, completed{0};
  std::atomic<int64_t> at{0};
};

struct Stream {
  int device;
  std::string role;
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::function<void()>> tasks;
  bool busy = false, ended = false;
};

thread_local std::vector<int> contexts;
std::mutex roles_mutex;
std::map<int, int> streams_of;

std::string where(Stream* stream) {
  return stream == nullptr ? "xla" : "d" + std::to_string(stream->device) + " " + stream->role;
}

void put(Stream* stream, std::function<void()> task) {
  if (stream == nullptr) return task();  // XLA's CPU: in order, at once
  std::lock_guard<std::mutex> lock(stream->mutex);
  stream->tasks.push_back(std::move(task));
  stream->changed.notify_all();
}

void serve(std::shared_ptr<Stream> stream) {
  std::unique_lock<std::mutex> lock(stream->mutex);
  while (true) {
    stream->changed.wait(lock, [&] { return stream->ended || !stream->tasks.empty(); });
    if (stream->tasks.empty()) return;
    auto task = std::move(stream->tasks.front());
    stream->tasks.pop_front();
    stream->busy = true;
    lock.unlock();
    task();
    lock.lock();
    stream->busy = false;
  }
}

std::map<Stream*, std::shared_ptr<Stream>> all_streams;

struct Desc {
  char kind = 0;
  const void* from = nullptr;
  void* to = nullptr;
  size_t count = 0;
  int type = 0, peer = 0;
};

struct Round {
  std::map<int, std::vector<Desc>> arrived;
  bool complete = false;
};

struct Clique {
  int size = 0, joined = 0;
  std::mutex mutex;
  std::condition_variable changed;
  std::map<int64_t, Round> rounds;
};

struct Comm {
  std::shared_ptr<Clique> clique;
  int rank = 0;
  int64_t calls = 0;
  std::atomic<bool> aborted{false};
};

std::mutex cliques_mutex;
std::map<std::string, std::shared_ptr<Clique>> cliques;
thread_local int depth = 0;
thread_local std::map<Comm*, std::pair<Stream*, std::vector<Desc>>> grouped;

size_t width(int type) { return type == 7 || type == 2 ? 4 : 2; }

float bf16(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

uint16_t bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

std::vector<char> sum(Round& round, int size, size_t first, size_t count, int type) {
  std::vector<char> total(count * width(type));
  for (size_t i = 0; i < count; ++i) {
    double value = 0;
    int64_t whole = 0;
    for (int r = 0; r < size; ++r) {
      const char* from = static_cast<const char*>(round.arrived[r][0].from);
      if (type == 7) value += reinterpret_cast<const float*>(from)[first + i];
      if (type == 9) value += bf16(reinterpret_cast<const uint16_t*>(from)[first + i]);
      if (type == 2) whole += reinterpret_cast<const int32_t*>(from)[first + i];
    }
    if (type == 7) reinterpret_cast<float*>(total.data())[i] = static_cast<float>(value);
    if (type == 9) reinterpret_cast<uint16_t*>(total.data())[i] = bf16(static_cast<float>(value));
    if (type == 2) reinterpret_cast<int32_t*>(total.data())[i] = static_cast<int32_t>(whole);
  }
  return total;
}

void finish(Round& round, int size) {
  const Desc& first = round.arrived[0][0];
  if (first.kind == 'A') {
    auto total = sum(round, size, 0, first.count, first.type);
    for (int r = 0; r < size; ++r) std::memcpy(round.arrived[r][0].to, total.data(), total.size());
  } else if (first.kind == 'R') {
    std::vector<std::vector<char>> totals;
    for (int r = 0; r < size; ++r) {
      const size_t begin = static_cast<size_t>(r) * first.count;
      totals.push_back(sum(round, size, begin, first.count, first.type));
    }
    for (int r = 0; r < size; ++r) {
      std::memcpy(round.arrived[r][0].to, totals[r].data(), totals[r].size());
    }
  } else {
    for (int source = 0; source < size; ++source) {
      for (const Desc& sent : round.arrived[source]) {
        if (sent.kind != 'S') continue;
        for (const Desc& got : round.arrived[sent.peer]) {
          if (got.kind == 'G' && got.peer == source) {
            std::memcpy(got.to, sent.from, sent.count * width(sent.type));
          }
        }
      }
    }
  }
  round.complete = true;
}

void collective(Comm* comm, Stream* stream, std::vector<Desc> descs) {
  const int64_t number = comm->calls++;
  put(stream, [comm, number, descs = std::move(descs)] {
    auto clique = comm->clique;
    std::unique_lock<std::mutex> lock(clique->mutex);
    Round& round = clique->rounds[number];
    const int64_t stuck = setting("stuck_at");
    if (stuck < 0 || number < stuck) {
      round.arrived[comm->rank] = descs;
      if (static_cast<int>(round.arrived.size()) == clique->size) {
        finish(round, clique->size);
        clique->changed.notify_all();
      }
    }
    while (!round.complete && !comm->aborted) {
      clique->changed.wait_for(lock, std::chrono::milliseconds(1));
    }
    if (comm->aborted) note("r" + std::to_string(comm->rank) + " left a collective");
  });
}

int launch(const char* name, Desc desc, Comm* comm, Stream* stream) {
  note(where(stream) + " " + name + " " + std::to_string(desc.count));
  if (spent("error_in")) return 3;
  if (setting("block_in_call") == 1) {
    while (!comm->aborted) nap();
    return 6;
  }
  if (depth > 0) {
    grouped[comm].first = stream;
    grouped[comm].second.push_back(desc);
  } else {
    collective(comm, stream, {desc});
  }
  return 0;
}

ffi::Error gemm(int32_t device, ffi::Span<const int64_t> offsets, ffi::Span<const int64_t> counts,
                ffi::Span<const int64_t> tiles, int64_t missing, ffi::AnyBuffer values,
                ffi::AnyBuffer packed, ffi::BufferR1<ffi::S32> counters,
                ffi::Result<ffi::AnyBuffer> packed_after,
                ffi::Result<ffi::BufferR1<ffi::S32>> counters_after) {
  if (packed.untyped_data() != packed_after->untyped_data() ||
      counters.typed_data() != counters_after->typed_data()) {
    return ffi::Error::Internal("XLA moved a buffer of the GEMM");
  }
  const size_t item = ffi::ByteWidth(values.element_type());
  auto* raised = reinterpret_cast<std::atomic<int32_t>*>(counters.typed_data());
  for (size_t i = 0; i < counts.size(); ++i) {
    const size_t at = static_cast<size_t>(offsets[i]) * item;
    // Half of it late: a collective that does not wait sends the other half.
    const size_t bytes = static_cast<size_t>(counts[i]) * item, half = bytes / 2;
    const char* from = static_cast<const char*>(values.untyped_data()) + at;
    char* to = static_cast<char*>(packed.untyped_data()) + at;
    std::memcpy(to, from, half);
    for (int64_t tile = 0; tile < tiles[i]; ++tile) {
      if (tile + 1 == tiles[i]) {
        nap();
        std::memcpy(to + half, from + half, bytes - half);
        note("d" + std::to_string(device) + " gemm " + std::to_string(i));
        if (missing == static_cast<int64_t>(i)) break;
      }
      raised[i].fetch_add(1, std::memory_order_release);
    }
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(FakeGemm, gemm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::DeviceOrdinal>()
                                  .Attr<ffi::Span<const int64_t>>("offsets")
                                  .Attr<ffi::Span<const int64_t>>("counts")
                                  .Attr<ffi::Span<const int64_t>>("tiles")
                                  .Attr<int64_t>("missing")
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::BufferR1<ffi::S32>>());

extern "C" {

void fake_reset() {
  std::lock_guard<std::mutex> roles(roles_mutex);
  std::lock_guard<std::mutex> lock(log_mutex);
  streams_of.clear();  // the next is the private one again
  entries.clear();
  settings.clear();
}
void fake_set(const char* name, int64_t value) {
  std::lock_guard<std::mutex> lock(log_mutex);
  settings[name] = value;
}
const char* fake_log() {
  std::lock_guard<std::mutex> lock(log_mutex);
  joined.clear();
  for (const auto& entry : entries) joined += entry + "\n";
  return joined.c_str();
}

int64_t fake_events() { return made_events; }
int64_t fake_held() { return held; }

int cuInit(unsigned) { return 0; }
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
int cuDevicePrimaryCtxRetain(void** context, int device) {
  *context = reinterpret_cast<void*>(static_cast<intptr_t>(device + 1));
  return 0;
}
int cuDevicePrimaryCtxRelease_v2(int) { return 0; }
int cuCtxPushCurrent_v2(void* context) {
  contexts.push_back(static_cast<int>(reinterpret_cast<intptr_t>(context)) - 1);
  return 0;
}
int cuCtxPopCurrent_v2(void**) {
  contexts.pop_back();
  return 0;
}
int cuCtxGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return 0;
}
int cuStreamCreateWithPriority(Stream** stream, unsigned flags, int priority) {
  if (contexts.empty() || flags != 1) return 201;
  auto made = std::make_shared<Stream>();
  made->device = contexts.back();
  std::lock_guard<std::mutex> lock(roles_mutex);
  const char* roles[] = {"private", "signals", "rescue"};
  made->role = roles[streams_of[made->device]++ % 3];
  note(where(made.get()) + " priority " + std::to_string(priority));
  all_streams[made.get()] = made;
  std::thread(serve, made).detach();
  held++;
  *stream = made.get();
  return 0;
}
int cuStreamDestroy_v2(Stream* stream) {
  std::lock_guard<std::mutex> roles(roles_mutex);
  std::lock_guard<std::mutex> lock(stream->mutex);
  stream->ended = true;
  stream->changed.notify_all();
  held--;
  return 0;
}
int cuStreamQuery(Stream* stream) {
  std::lock_guard<std::mutex> lock(stream->mutex);
  return stream->busy || !stream->tasks.empty() ? 600 : 0;
}
int cuEventCreate(Event** event, unsigned) { return made_events++, *event = new Event, 0; }
int cuEventDestroy_v2(Event*) { return 0; }
int cuEventRecord(Event* event, Stream* stream) {
  const int64_t number = ++event->recorded;
  note(where(stream) + " record");
  put(stream, [event, number] {
    event->at = Clock::now().time_since_epoch().count();
    event->completed = number;
  });
  return 0;
}
int cuEventQuery(Event* event) { return event->completed >= event->recorded ? 0 : 600; }
int cuEventElapsedTime(float* ms, Event* from, Event* to) {
  *ms = static_cast<float>(static_cast<double>(to->at - from->at) * 1e-6);
  return 0;
}
int cuEventSynchronize(Event* event) {
  while (event->completed < event->recorded) nap();
  return 0;
}
int cuStreamSynchronize(Stream* stream) {
  while (cuStreamQuery(stream) != 0) nap();
  return 0;
}
int cuStreamWaitEvent(Stream* stream, Event* event, unsigned) {
  const int64_t number = event->recorded;
  note(where(stream) + " wait_event");
  put(stream, [event, number] {
    while (event->completed < number) nap();
  });
  const int64_t late_ms = stream == nullptr ? setting("late_ms") : 0;
  if (late_ms > 0) {
    std::this_thread::sleep_for(std::chrono::milliseconds(late_ms));
    note("xla goes on");
  }
  return 0;
}
int cuStreamWaitValue32_v2(Stream* stream, unsigned long long address, uint32_t value, unsigned) {
  note(where(stream) + " wait " + std::to_string(value));
  auto* counter = reinterpret_cast<std::atomic<int32_t>*>(address);
  put(stream, [counter, value] {
    while (counter->load(std::memory_order_acquire) - static_cast<int32_t>(value) < 0) nap();
  });
  return 0;
}
int cuMemsetD32Async(unsigned long long address, unsigned value, size_t count, Stream* stream) {
  note(where(stream) + " memset32 " + std::to_string(value) + " x" + std::to_string(count));
  if (spent("memset_error_in")) return 700;
  put(stream, [=] {
    auto* words = reinterpret_cast<std::atomic<uint32_t>*>(address);
    for (size_t i = 0; i < count; ++i) words[i] = value;
  });
  return 0;
}
int cuMemsetD8Async(unsigned long long address, unsigned char value, size_t count, Stream* stream) {
  note(where(stream) + " memset8 " + std::to_string(value));
  put(stream, [=] { std::memset(reinterpret_cast<void*>(address), value, count); });
  return 0;
}
int cuMemcpyAsync(unsigned long long to, unsigned long long from, size_t bytes, Stream* stream) {
  note(where(stream) + " copy " + std::to_string(bytes));
  if (spent("copy_error_in")) return 700;
  put(stream, [=] {
    while (setting("hold_copies") == 1) nap();
    std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes);
    note("copied " + std::to_string(bytes));
  });
  return 0;
}
int cuMemcpyDtoHAsync_v2(void* to, unsigned long long from, size_t bytes, Stream* stream) {
  put(stream, [=] { std::memcpy(to, reinterpret_cast<void*>(from), bytes); });
  return 0;
}
int cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
  held++;
  return *pointer = malloc(bytes), 0;
}
int cuMemFreeHost(void* pointer) {
  held--;
  return free(pointer), 0;
}
int cuMemAlloc_v2(unsigned long long* pointer, size_t bytes) {
  held++;
  *pointer = reinterpret_cast<unsigned long long>(malloc(bytes));
  return 0;
}
int cuMemFree_v2(unsigned long long pointer) {
  held--;
  return free(reinterpret_cast<void*>(pointer)), 0;
}
int cuGetErrorName(int error, const char** name) {
  *name = error == 700 ? "CUDA_ERROR_ILLEGAL_ADDRESS" : "CUDA_ERROR_OTHER";
  return 0;
}
int cuThreadExchangeStreamCaptureMode(int*) { return 0; }

struct Id {
  char bytes[128];
};
int ncclGetVersion(int* version) {
  const int64_t given = setting("version");
  *version = given < 0 ? 22809 : static_cast<int>(given);
  return 0;
}
int ncclGetUniqueId(Id* id) {
  static std::atomic<int> next{1};
  std::memset(id->bytes, 0, sizeof(id->bytes));
  std::snprintf(id->bytes, sizeof(id->bytes), "clique %d", next++);
  return 0;
}
int ncclCommInitRankConfig(Comm** comm, int size, Id id, int rank, const int* config) {
  // size, magic, version, blocking, cga, min, max: as of the header
  note("init r" + std::to_string(rank) + "/" + std::to_string(size) + " blocking=" +
       std::to_string(config[4]) + " cga=" + std::to_string(config[5]) + " max=" +
       std::to_string(config[7]));
  if (spent("init_error_in")) return 2;
  std::shared_ptr<Clique> clique;
  {
    std::lock_guard<std::mutex> lock(cliques_mutex);
    auto& found = cliques[std::string(id.bytes)];
    if (!found) found = std::make_shared<Clique>();
    clique = found;
  }
  auto made = new Comm;
  made->clique = clique;
  made->rank = rank;
  std::unique_lock<std::mutex> lock(clique->mutex);
  clique->size = size;
  clique->joined += 1;
  clique->changed.notify_all();
  clique->changed.wait(lock, [&] { return clique->joined == size; });
  *comm = made;
  return 0;
}
int ncclCommDestroy(Comm* comm) {
  note("destroy r" + std::to_string(comm->rank));
  return 0;
}
int ncclCommAbort(Comm* comm) {
  note("abort r" + std::to_string(comm->rank));
  const int64_t slow_ms = setting("slow_abort_ms");
  if (slow_ms > 0) std::this_thread::sleep_for(std::chrono::milliseconds(slow_ms));
  comm->aborted = true;
  return 0;
}
int ncclCommGetAsyncError(Comm* comm, int* error) {
  *error = setting("async_error_of") == comm->rank ? 6 : 0;
  return 0;
}
const char* ncclGetErrorString(int error) { return error == 3 ? "internal error" : "remote error"; }
const char* ncclGetLastError(Comm*) { return "said the fake"; }
int ncclGroupStart() { return depth++, 0; }
int ncclGroupEnd() {
  if (--depth > 0) return 0;
  for (auto& [comm, work] : grouped) collective(comm, work.first, std::move(work.second));
  grouped.clear();
  return 0;
}
int ncclAllReduce(const void* from, void* to, size_t count, int type, int, Comm* comm, Stream* s) {
  return launch("all_reduce", {'A', from, to, count, type, 0}, comm, s);
}
int ncclReduceScatter(const void* from, void* to, size_t count, int type, int, Comm* comm,
                      Stream* s) {
  return launch("reduce_scatter", {'R', from, to, count, type, 0}, comm, s);
}
int ncclSend(const void* from, size_t count, int type, int peer, Comm* comm, Stream* s) {
  return launch("send", {'S', from, nullptr, count, type, peer}, comm, s);
}
int ncclRecv(void* to, size_t count, int type, int peer, Comm* comm, Stream* s) {
  return launch("recv", {'G', nullptr, to, count, type, peer}, comm, s);
}

}  // extern "C"
