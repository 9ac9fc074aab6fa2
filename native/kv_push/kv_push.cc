// KV pages that go to another device layer by layer while the step that fills them goes on.
//
// The step calls a handler after each layer's pages are written, and another at its end. They only
// note where the step is; a thread of the link copies. On a GPU it puts copies on a private stream,
// behind what fills the layer, for the copy engines; on a CPU it copies by itself.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "native/cuda.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Clock = std::chrono::steady_clock;

// ------------------------------------------------------------------------------ where it copies

// A moment of the work on a device: an event there, a time on a CPU.
struct Mark {
  CUevent event = nullptr;
  Clock::time_point at;
};

class Place {
 public:
  virtual ~Place() = default;
  virtual void enter_thread() {}
  // Behind all that is on the stream of the step so far.
  virtual Mark mark(CUstream stream) = 0;
  // The copies to come are to begin after it.
  virtual void begin_after(const Mark& mark) = 0;
  virtual void copy(char* to, const char* from, size_t bytes) = 0;
  // Behind all copies so far.
  virtual Mark copied() = 0;
  virtual void wait(const Mark& mark) = 0;
  virtual double seconds(const Mark& from, const Mark& to) = 0;
  virtual void give_back(Mark&) {}
  // A step's buffers are XLA's again when it has ended, so its copies must have.
  virtual bool outlives_steps() const = 0;
};

class Host : public Place {
 public:
  Mark mark(CUstream) override { return {nullptr, Clock::now()}; }
  void begin_after(const Mark&) override {}
  void copy(char* to, const char* from, size_t bytes) override { std::memcpy(to, from, bytes); }
  Mark copied() override { return mark(nullptr); }
  void wait(const Mark&) override {}
  double seconds(const Mark& from, const Mark& to) override {
    return std::chrono::duration<double>(to.at - from.at).count();
  }
  bool outlives_steps() const override { return false; }
};

class Gpu : public Place {
 public:
  explicit Gpu(int ordinal) {
    int device;
    CUDA(DeviceGet(&device, ordinal));
    CUDA(PrimaryRetain(&context_, device));  // and stays retained: XLA has it in any case
    Current current(context_);
    int least, greatest;
    CUDA(PriorityRange(&least, &greatest));
    CUDA(StreamCreate(&stream_, kStreamNonBlocking, greatest));
  }
  ~Gpu() override {
    CUcontext popped;
    if (cuda.CtxPush(context_) != 0) return;
    cuda.StreamSynchronize(stream_);
    cuda.StreamDestroy(stream_);
    events_.clear();
    cuda.CtxPop(&popped);
  }
  void enter_thread() override {
    CUDA(CtxPush(context_));
    relax();
  }
  Mark mark(CUstream stream) override {
    Current current(context_);
    Mark made = take();
    CUDA(EventRecord(made.event, stream));
    return made;
  }
  void begin_after(const Mark& mark) override { CUDA(StreamWaitEvent(stream_, mark.event, 0)); }
  void copy(char* to, const char* from, size_t bytes) override {
    CUDA(Copy(address(to), address(from), bytes, stream_));
  }
  Mark copied() override { return mark(stream_); }
  void wait(const Mark& mark) override {
    Current current(context_);
    int before = relax();
    const CUresult result = cuda.EventSynchronize(mark.event);
    cuda.ExchangeCaptureMode(&before);
    check_cuda(result, "EventSynchronize");
  }
  double seconds(const Mark& from, const Mark& to) override {
    Current current(context_);
    float ms = 0;
    CUDA(EventElapsed(&ms, from.event, to.event));
    return static_cast<double>(ms) * 1e-3;
  }
  void give_back(Mark& mark) override {
    std::lock_guard<std::mutex> lock(mutex_);
    events_.give(mark.event);
  }
  bool outlives_steps() const override { return true; }

 private:
  // What this thread calls breaks no capture of XLA's; returns what held before.
  int relax() {
    int mode = kCaptureRelaxed;
    CUDA(ExchangeCaptureMode(&mode));
    return mode;
  }
  Mark take() {
    std::lock_guard<std::mutex> lock(mutex_);
    return {events_.take(), {}};
  }

  CUcontext context_ = nullptr;
  CUstream stream_ = nullptr;
  std::mutex mutex_;  // of the events
  EventPool events_{kEventTiming};
};

// ------------------------------------------------------------------------------ steps and layers

// Consecutive pages on both sides.
struct Run {
  size_t from, to, pages;
};

struct Step {
  std::vector<Run> runs;
  size_t layer_bytes = 0;
  std::vector<const void*> filled;  // keys and values of the layers that the step has filled
  Mark begin, end;                  // the first layer was filled; the step ended
  std::vector<Mark> sent;           // of each layer whose copies are on their way, or done on a CPU
  bool ended = false;
};

struct Filled {
  Step* step;
  const char* keys;
  const char* values;
  size_t layer;
  Mark ready;
};

// Where keys and values of a layer are here, as far as that is known ahead, and there.
struct Layer {
  const void* keys;
  const void* values;
  char* to_keys;
  char* to_values;
};

constexpr char kMoved[] = "XLA moved the pages";

class Link {
 public:
  Link(std::unique_ptr<Place> place, std::vector<Layer> layers, size_t pages, size_t page_bytes)
      : place_(std::move(place)), layers_(std::move(layers)), pages_(pages),
        page_bytes_(page_bytes), thread_([this] { serve(); }) {}

  ~Link() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closed_ = true;
      changed_.notify_all();
    }
    thread_.join();
  }

  // The next step that runs is to send these pages.
  int64_t announce(size_t count, const int32_t* from, const int32_t* to) {
    Step step;
    for (size_t i = 0; i < count; ++i) {
      for (const int32_t page : {from[i], to[i]}) {
        if (page < 0 || static_cast<size_t>(page) >= pages_) {
          throw Failure("page " + std::to_string(page) + " is not in [0, " +
                        std::to_string(pages_) + ")");
        }
      }
      const auto source = static_cast<size_t>(from[i]), target = static_cast<size_t>(to[i]);
      if (!step.runs.empty()) {
        Run& last = step.runs.back();
        if (last.from + last.pages == source && last.to + last.pages == target) {
          last.pages += 1;
          continue;
        }
      }
      step.runs.push_back({source, target, 1});
    }
    step.layer_bytes = 2 * count * page_bytes_;
    std::lock_guard<std::mutex> lock(mutex_);
    raise();
    const int64_t number = next_++;
    steps_.emplace(number, std::move(step));
    announced_.push_back(number);
    return number;
  }

  void filled(CUstream stream, int64_t layer, const ffi::AnyBuffer& keys,
              const ffi::AnyBuffer& values) {
    const auto index = static_cast<size_t>(layer);
    if (layer < 0 || index >= layers_.size()) {
      throw Failure("layer " + std::to_string(layer) + " is not in [0, " +
                    std::to_string(layers_.size()) + ")");
    }
    check(keys, layers_[index].keys);
    check(values, layers_[index].values);
    const Mark ready = place_->mark(stream);
    std::lock_guard<std::mutex> lock(mutex_);
    raise();
    if (index == 0) {
      if (running_ != nullptr) throw Failure("a step began before the one before it had ended");
      if (announced_.empty()) throw Failure("a step ran whose pages nobody announced");
      running_ = &steps_.at(announced_.front());
      running_->begin = ready;
      announced_.pop_front();
    }
    if (running_ == nullptr || running_->filled.size() != 2 * index) {
      throw Failure("layer " + std::to_string(layer) + " came out of order");
    }
    running_->filled.push_back(keys.untyped_data());
    running_->filled.push_back(values.untyped_data());
    unsent_ += 1;
    queue_.push_back({running_, static_cast<const char*>(keys.untyped_data()),
                      static_cast<const char*>(values.untyped_data()), index, ready});
    changed_.notify_all();
  }

  // `pages` are those of all layers, which have been in their places since they were filled.
  void ended(CUstream stream, const std::vector<const void*>& pages) {
    const Mark end = place_->mark(stream);
    std::unique_lock<std::mutex> lock(mutex_);
    raise();
    if (running_ == nullptr || running_->filled.size() != 2 * layers_.size()) {
      throw Failure("a step ended before all its layers were filled");
    }
    if (running_->filled != pages) throw Failure(kMoved);
    Step* step = std::exchange(running_, nullptr);
    step->end = end;
    step->ended = true;
    lock.unlock();
    settle();
  }

  // Before XLA may have the buffers of a step back, also of one that failed.
  void settle() {
    if (place_->outlives_steps()) return;
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return unsent_ == 0 || !error_.empty(); });
  }

  struct Arrival {
    double bytes, overlapped_bytes, late_s;
  };

  // Waits until the pages of a step that has run are there.
  Arrival wait(int64_t number) {
    std::unique_lock<std::mutex> lock(mutex_);
    auto found = steps_.find(number);
    if (found == steps_.end()) {
      throw Failure("step " + std::to_string(number) + " was not announced, or waited for before");
    }
    Step& step = found->second;
    raise();
    if (!step.ended) throw Failure("step " + std::to_string(number) + " has not run");
    wait_until_sent(lock, step);
    lock.unlock();
    place_->wait(step.sent.back());
    place_->wait(step.end);
    const auto layer_bytes = static_cast<double>(step.layer_bytes);
    Arrival arrival{layer_bytes * static_cast<double>(step.sent.size()), 0, 0};
    const double end_s = place_->seconds(step.begin, step.end);
    for (const Mark& sent : step.sent) {
      const double late_s = place_->seconds(step.begin, sent) - end_s;
      if (late_s <= 0) arrival.overlapped_bytes += layer_bytes;
      arrival.late_s = std::max(arrival.late_s, late_s);
    }
    for (Mark& sent : step.sent) place_->give_back(sent);
    place_->give_back(step.begin);
    place_->give_back(step.end);
    lock.lock();
    steps_.erase(found);
    return arrival;
  }

 private:
  void check(const ffi::AnyBuffer& buffer, const void* expected) const {
    if (buffer.size_bytes() != pages_ * page_bytes_) {
      throw Failure("the pages take " + std::to_string(buffer.size_bytes()) + " bytes, not " +
                    std::to_string(pages_) + " times " + std::to_string(page_bytes_));
    }
    if (expected != nullptr && buffer.untyped_data() != expected) {
      throw Failure(kMoved);
    }
  }

  void raise() const {
    if (!error_.empty()) throw Failure(error_);
  }

  void wait_until_sent(std::unique_lock<std::mutex>& lock, const Step& step) {
    changed_.wait(lock, [&] { return step.sent.size() == layers_.size() || !error_.empty(); });
    raise();
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    try {
      place_->enter_thread();
      while (true) {
        changed_.wait(lock, [&] { return closed_ || !queue_.empty(); });
        if (closed_) return;
        Filled next = queue_.front();
        queue_.pop_front();
        lock.unlock();
        const Mark sent = send(next);
        lock.lock();
        next.step->sent.push_back(sent);
        unsent_ -= 1;
        changed_.notify_all();
      }
    } catch (const std::exception& error) {
      if (!lock.owns_lock()) lock.lock();
      error_ = error.what();
      changed_.notify_all();
    }
  }

  Mark send(Filled& filled) {
    const Layer& layer = layers_[filled.layer];
    place_->begin_after(filled.ready);
    for (const Run& run : filled.step->runs) {
      const size_t from = run.from * page_bytes_, to = run.to * page_bytes_;
      place_->copy(layer.to_keys + to, filled.keys + from, run.pages * page_bytes_);
      place_->copy(layer.to_values + to, filled.values + from, run.pages * page_bytes_);
    }
    if (filled.layer > 0) place_->give_back(filled.ready);  // that of the first is the beginning
    return place_->copied();
  }

  std::unique_ptr<Place> place_;
  const std::vector<Layer> layers_;
  const size_t pages_, page_bytes_;

  std::mutex mutex_;  // everything below
  std::condition_variable changed_;
  std::map<int64_t, Step> steps_;  // announced, and nobody waited for their arrival yet
  std::deque<int64_t> announced_;  // those that have not begun
  std::deque<Filled> queue_;
  size_t unsent_ = 0;
  Step* running_ = nullptr;
  int64_t next_ = 0;
  std::string error_;
  bool closed_ = false;
  std::thread thread_;
};

std::mutex links_mutex;
// By the device that fills the pages. Never destroyed: a process may end in the middle of a step.
std::map<int, std::shared_ptr<Link>>& links() {
  static auto* all = new std::map<int, std::shared_ptr<Link>>();
  return *all;
}

std::shared_ptr<Link> link(int device) {
  std::lock_guard<std::mutex> lock(links_mutex);
  auto found = links().find(device);
  if (found == links().end()) {
    throw Failure("device " + std::to_string(device) + " has no link");
  }
  return found->second;
}

// ------------------------------------------------------------------------------ FFI handlers

constexpr char kWho[] = "native.kv_push";

void check_in_place(const ffi::AnyBuffer& argument, ffi::Result<ffi::AnyBuffer>& result) {
  if (argument.untyped_data() != result->untyped_data()) {
    throw Failure("the result must alias the first argument");
  }
}

template <typename Work>
ffi::Error told(int device, Work work) {
  return guarded(kWho, [&] {
    auto found = link(device);
    try {
      work(*found);
    } catch (const Failure&) {
      found->settle();
      throw;
    }
  });
}

// The pages are arguments alone: as results XLA would copy them.
ffi::Error filled(CUstream stream, int32_t device, int64_t layer, ffi::AnyBuffer next,
                  ffi::AnyBuffer keys, ffi::AnyBuffer values, ffi::Result<ffi::AnyBuffer> same) {
  return told(device, [&](Link& link) {
    check_in_place(next, same);
    link.filled(stream, layer, keys, values);
  });
}

ffi::Error ended(CUstream stream, int32_t device, ffi::AnyBuffer last, ffi::RemainingArgs pages,
                 ffi::Result<ffi::AnyBuffer> same) {
  return told(device, [&](Link& link) {
    check_in_place(last, same);
    std::vector<const void*> addresses;
    for (size_t i = 0; i < pages.size(); ++i) {
      addresses.push_back(pages.get<ffi::AnyBuffer>(i)->untyped_data());
    }
    link.ended(stream, addresses);
  });
}

// XLA's CPU has no stream.
ffi::Error filled_on_cpu(int32_t device, int64_t layer, ffi::AnyBuffer next, ffi::AnyBuffer keys,
                         ffi::AnyBuffer values, ffi::Result<ffi::AnyBuffer> same) {
  return filled(nullptr, device, layer, next, keys, values, same);
}

ffi::Error ended_on_cpu(int32_t device, ffi::AnyBuffer last, ffi::RemainingArgs pages,
                        ffi::Result<ffi::AnyBuffer> same) {
  return ended(nullptr, device, last, pages, same);
}

template <typename Binding>
auto filled_binding(Binding&& binding) {
  return std::move(binding)
      .template Attr<int64_t>("layer")
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .template Ret<ffi::AnyBuffer>();
}

template <typename Binding>
auto ended_binding(Binding&& binding) {
  return std::move(binding)
      .template Arg<ffi::AnyBuffer>()
      .RemainingArgs()
      .template Ret<ffi::AnyBuffer>();
}

auto on_cuda() {
  return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<CUstream>>().Ctx<ffi::DeviceOrdinal>();
}

auto on_cpu() { return ffi::Ffi::Bind().Ctx<ffi::DeviceOrdinal>(); }

}  // namespace

// None has the trait kCmdBufferCompatible: a CUDA graph would run them once, at capture.
XLA_FFI_DEFINE_HANDLER_SYMBOL(JpdKvFilled, filled, filled_binding(on_cuda()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(JpdKvEnded, ended, ended_binding(on_cuda()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(JpdKvFilledCpu, filled_on_cpu, filled_binding(on_cpu()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(JpdKvEndedCpu, ended_on_cpu, ended_binding(on_cpu()));

// ------------------------------------------------------------------------------ for Python
// Functions return -1 on failure; jpd_kv_message() then says why, in the same thread.

extern "C" {

const char* jpd_kv_message() { return message.c_str(); }

// `device` is a GPU, driven by the libcuda at `cuda_path`, or one of XLA's CPUs where that is null.
// `sources` and `targets` hold addresses of keys and values of each layer; a source may be 0.
int64_t jpd_kv_open(int device, const char* cuda_path, int64_t layers, const uint64_t* sources,
                    const uint64_t* targets, int64_t pages, int64_t page_bytes) {
  return reported([&]() -> int64_t {
    std::lock_guard<std::mutex> lock(links_mutex);
    if (links().count(device) > 0) {
      throw Failure("device " + std::to_string(device) + " has a link already");
    }
    std::vector<Layer> all;
    for (int64_t i = 0; i < layers; ++i) {
      all.push_back({reinterpret_cast<const void*>(sources[2 * i]),
                     reinterpret_cast<const void*>(sources[2 * i + 1]),
                     reinterpret_cast<char*>(targets[2 * i]),
                     reinterpret_cast<char*>(targets[2 * i + 1])});
    }
    std::unique_ptr<Place> place;
    if (cuda_path == nullptr) {
      place = std::make_unique<Host>();
    } else {
      load_cuda(cuda_path);
      place = std::make_unique<Gpu>(device);
    }
    links()[device] =
        std::make_shared<Link>(std::move(place), std::move(all), static_cast<size_t>(pages),
                               static_cast<size_t>(page_bytes));
    return 0;
  });
}

int64_t jpd_kv_announce(int device, int64_t count, const int32_t* from, const int32_t* to) {
  return reported([&] { return link(device)->announce(static_cast<size_t>(count), from, to); });
}

// `found`: bytes, those of them that were there when the step ended, seconds that the last came
// after its end.
int64_t jpd_kv_wait(int device, int64_t number, double* found) {
  return reported([&]() -> int64_t {
    const auto arrival = link(device)->wait(number);
    found[0] = arrival.bytes;
    found[1] = arrival.overlapped_bytes;
    found[2] = arrival.late_s;
    return 0;
  });
}

int64_t jpd_kv_close(int device) {
  return reported([&]() -> int64_t {
    std::shared_ptr<Link> closed = link(device);
    std::lock_guard<std::mutex> lock(links_mutex);
    links().erase(device);
    return 0;
  });
}

}  // extern "C"
