// Collectives on a private stream beside a GEMM that signals groups of finished tiles: NCCL ranks,
// the XLA FFI handlers that start and join them, and a watchdog that ends what is stuck.
//
// libnccl is opened at run time and declared here, as libcuda is in cuda.h, so that neither its
// header nor its link library is needed. What Python calls is at the end (extern "C").

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "native/cuda.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

// ------------------------------------------------------------------------------ libnccl

constexpr unsigned kWaitGreaterOrEqual = 0;  // CU_STREAM_WAIT_VALUE_GEQ
constexpr int kReleased = INT_MAX / 2;       // at least any number of tiles and any ticket

struct ncclComm;
using NcclComm = ncclComm*;
using NcclResult = int;
struct UniqueId {
  char internal[128];
};
constexpr NcclResult kNcclInProgress = 7;
constexpr int kNcclSum = 0;
constexpr int kUndefined = INT_MIN;  // NCCL_CONFIG_UNDEF_INT

// ncclConfig_t as of NCCL 2.18, whose fields every later version reads first. A later version
// fills in what `version` says is not there; trafficClass (2.25) stands where the padding would.
struct Config {
  size_t size = sizeof(Config);
  unsigned magic = 0xcafebeef;
  unsigned version = 21800;
  int blocking = 1;
  int cga_cluster_size = kUndefined;
  int min_ctas = kUndefined;
  int max_ctas = kUndefined;
  const char* net_name = nullptr;
  int split_share = kUndefined;
  int traffic_class = kUndefined;
};

struct Nccl {
  NcclResult (*GetVersion)(int*);
  NcclResult (*GetUniqueId)(UniqueId*);
  NcclResult (*InitRankConfig)(NcclComm*, int, UniqueId, int, Config*);
  NcclResult (*Destroy)(NcclComm);
  NcclResult (*Abort)(NcclComm);
  NcclResult (*GetAsyncError)(NcclComm, NcclResult*);
  const char* (*ErrorString)(NcclResult);
  const char* (*LastError)(NcclComm);
  NcclResult (*GroupStart)();
  NcclResult (*GroupEnd)();
  NcclResult (*AllReduce)(const void*, void*, size_t, int, int, NcclComm, CUstream);
  NcclResult (*ReduceScatter)(const void*, void*, size_t, int, int, NcclComm, CUstream);
  NcclResult (*Send)(const void*, size_t, int, int, NcclComm, CUstream);
  NcclResult (*Recv)(void*, size_t, int, int, NcclComm, CUstream);
};

Nccl nccl;
std::atomic<bool> loaded{false};

void load(const char* cuda_path, const char* nccl_path) {
  load_cuda(cuda_path);
  void* library = open_library(nccl_path);
  find(library, "ncclGetVersion", nccl.GetVersion);
  find(library, "ncclGetUniqueId", nccl.GetUniqueId);
  find(library, "ncclCommInitRankConfig", nccl.InitRankConfig);
  find(library, "ncclCommDestroy", nccl.Destroy);
  find(library, "ncclCommAbort", nccl.Abort);
  find(library, "ncclCommGetAsyncError", nccl.GetAsyncError);
  find(library, "ncclGetErrorString", nccl.ErrorString);
  find(library, "ncclGetLastError", nccl.LastError);
  find(library, "ncclGroupStart", nccl.GroupStart);
  find(library, "ncclGroupEnd", nccl.GroupEnd);
  find(library, "ncclAllReduce", nccl.AllReduce);
  find(library, "ncclReduceScatter", nccl.ReduceScatter);
  find(library, "ncclSend", nccl.Send);
  find(library, "ncclRecv", nccl.Recv);
  int version = 0;
  if (nccl.GetVersion(&version) != 0 || version < 21800) {
    throw Failure("NCCL " + std::to_string(version) + " is too old: 2.18 is needed");
  }
  loaded = true;
}

void check_nccl(NcclResult result, const char* call, NcclComm comm = nullptr) {
  if (result == 0) return;
  std::string text = std::string("NCCL: ") + call + " -> " + nccl.ErrorString(result);
  const char* detail = comm == nullptr ? nullptr : nccl.LastError(comm);
  if (detail != nullptr && *detail != 0) text += std::string(" (") + detail + ")";
  throw Failure(text);
}

// ------------------------------------------------------------------------------ what is asked for

enum class Collective { kAllReduce, kReduceScatter, kAllToAll };

Collective collective_of(std::string_view name) {
  if (name == "all_reduce") return Collective::kAllReduce;
  if (name == "reduce_scatter") return Collective::kReduceScatter;
  if (name == "all_to_all") return Collective::kAllToAll;
  throw Failure("no such collective: " + std::string(name));
}

const char* name_of(Collective collective) {
  switch (collective) {
    case Collective::kAllReduce:
      return "all_reduce";
    case Collective::kReduceScatter:
      return "reduce_scatter";
    case Collective::kAllToAll:
      return "all_to_all";
  }
  return "?";
}

int nccl_type(ffi::DataType type) {
  switch (type) {
    case ffi::DataType::S32:
      return 2;
    case ffi::DataType::F16:
      return 6;
    case ffi::DataType::F32:
      return 7;
    case ffi::DataType::F64:
      return 8;
    case ffi::DataType::BF16:
      return 9;
    default:
      throw Failure("this dtype is not supported: " + std::to_string(static_cast<int>(type)));
  }
}

struct Group {
  size_t offset;   // elements
  size_t count;    // elements
  int32_t target;  // what its counter reaches
};

// The buffers and attributes of one call of start or done, checked.
struct Call {
  Collective collective;
  std::vector<Group> groups;
  char* packed;
  char* out;  // the result; packed for an all-reduce
  size_t out_bytes;
  void* counters;
  int type;
  size_t item_bytes;
  bool enqueue;
  bool trace;
};

// One call of start until its collectives are complete.
struct Op {
  Call call;
  int64_t number = 0;
  CUevent ready = nullptr;   // XLA's stream: counters are zero, packed may be written
  CUevent sent = nullptr;    // private stream: every collective is complete
  CUevent end = nullptr;     // and the gate is passed: XLA's stream goes on
  CUevent gemm_end = nullptr;  // XLA's stream at done; only with a trace, as those that follow
  CUevent watched = nullptr;   // signal stream: every counter was seen
  std::vector<CUevent> signals, starts, ends;
  bool awaited = false;  // XLA's stream waits for `end`, or is about to
  bool joined = false;   // and the handler has returned: nobody needs this any more
  bool abandoned = false;  // its handler gave up: XLA has the buffers back
  bool poisoned = false;
  bool released = false;
  int32_t ticket = 0;  // the gate lets it pass from here on
  bool seen = false;
  Clock::time_point since;  // `ready` and all before were complete
};

// ------------------------------------------------------------------------------ one device's rank

constexpr int kAbortSeconds = 10;  // what clearing up may take
constexpr size_t kTraced = 512;       // calls whose events are kept until they are read
constexpr size_t kShownCounters = 1024;

struct Rank {
  int device = 0;
  int rank = 0;
  int size = 0;
  UniqueId id{};
  CUcontext context = nullptr;
  CUstream stream = nullptr;   // waits and collectives
  CUstream signals = nullptr;  // waits alone, so that a trace has the time of the signal itself
  CUstream rescue = nullptr;   // what the watchdog does while the others are stuck
  NcclComm comm = nullptr;
  std::atomic<bool> connected{false};  // `comm` is there
  int32_t* shown = nullptr;  // pinned copy of counters
  CUdeviceptr scratch = 0;   // of the warm-up
  // A word that every call waits for at its end. Once something failed it lets calls through one
  // by one: XLA's stream is held, and the buffers are ours, while the watchdog sees to them.
  CUdeviceptr gate = 0;

  std::timed_mutex mutex;  // everything below
  EventPool plain{kEventNoTiming};
  EventPool timed{kEventTiming};
  std::list<Op> waiting;  // started, not yet on the private stream
  std::list<Op> running;  // in the order of the private stream
  std::deque<Op> traced;
  CUevent base = nullptr;  // the first traced call
  int64_t calls = 0;
  int32_t tickets = 0;
  int unlocked = 0;  // handlers that use their call without the lock: nothing may be freed

  std::timed_mutex in_nccl;            // held for every call on `comm`, its abort excepted
  std::atomic<int64_t> busy_since{0};  // steady clock in ns; 0: no handler is in NCCL

  EventPool& pool(const Op& op) { return op.call.trace ? timed : plain; }

  void recycle(Op& op) {
    EventPool& events = pool(op);
    for (CUevent* event : {&op.ready, &op.sent, &op.end, &op.gemm_end, &op.watched}) {
      events.give(*event);
    }
    for (auto* list : {&op.signals, &op.starts, &op.ends}) {
      for (CUevent& event : *list) events.give(event);
      list->clear();
    }
  }

  void retire(std::list<Op>::iterator op) {
    if (op->call.trace) {
      if (traced.size() == kTraced) {
        recycle(traced.front());
        traced.pop_front();
      }
      traced.push_back(std::move(*op));
    } else {
      recycle(*op);
    }
    running.erase(op);
  }

  // The first call on the private stream that is not complete; complete ones are put away.
  Op* head() {
    for (auto op = running.begin(); op != running.end();) {
      const CUresult result = cuda.EventQuery(op->end);
      if (result == kNotReady) return &*op;
      check_cuda(result, "cuEventQuery");
      auto next = std::next(op);
      if (op->joined || op->abandoned) retire(op);
      op = next;
    }
    return nullptr;
  }
};

// Gives up the lock of rank.mutex for as long as this lives.
class Unlocked {
 public:
  Unlocked(Rank& rank, std::unique_lock<std::timed_mutex>& lock) : rank_(rank), lock_(lock) {
    rank_.unlocked += 1;
    lock_.unlock();
  }
  ~Unlocked() {
    lock_.lock();
    rank_.unlocked -= 1;
  }
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;

 private:
  Rank& rank_;
  std::unique_lock<std::timed_mutex>& lock_;
};

// ------------------------------------------------------------------------------ communicator

class Communicator : public std::enable_shared_from_this<Communicator> {
 public:
  std::vector<std::unique_ptr<Rank>> ranks;
  double timeout_s = 60;
  Config config;

  ~Communicator() { stop(); }

  void open(double init_timeout_s, size_t warm_up_bytes) {
    struct Progress {
      std::mutex mutex;
      std::condition_variable changed;
      size_t left;
      std::string error;
      bool over() const { return left == 0 || !error.empty(); }
    };
    auto progress = std::make_shared<Progress>();
    progress->left = ranks.size();
    std::vector<std::function<void()>> jobs;
    for (auto& rank : ranks) {
      // A thread each, as every rank waits for all others; detached, as one may wait forever.
      jobs.push_back([self = shared_from_this(), progress, &rank, warm_up_bytes] {
        std::string error;
        try {
          self->open_rank(*rank, warm_up_bytes);
        } catch (const std::exception& e) {
          error = "rank " + std::to_string(rank->rank) + " on device " +
                  std::to_string(rank->device) + ": " + e.what();
        }
        std::unique_lock<std::mutex> lock(progress->mutex);
        if (progress->error.empty()) progress->error = error;
        progress->left -= 1;
        progress->changed.notify_all();
        progress->changed.wait(lock, [&] { return progress->over(); });
        if (progress->error.empty()) return;
        lock.unlock();
        // Here and not where the error is raised: this may be long after, as a late peer came.
        abort(*rank);
        self->free_rank(*rank);
      });
    }
    launch_all(std::move(jobs));
    std::unique_lock<std::mutex> lock(progress->mutex);
    progress->changed.wait_for(lock, Seconds(init_timeout_s), [&] { return progress->over(); });
    if (!progress->over()) {
      progress->error = std::to_string(progress->left) + " of " + std::to_string(ranks.size()) +
                        " ranks of this process did not connect within " +
                        seconds(init_timeout_s) + ": are all processes there?";
      progress->changed.notify_all();
    }
    const std::string error = progress->error;
    lock.unlock();
    if (!error.empty()) {
      fail(error);
      wait(*abort_ranks(), kAbortSeconds);  // those connected may wait for the others on the GPU
      throw Failure(error);
    }
    watchdog_ = std::thread([this] { watch(); });
  }

  Rank& rank_on(int device) {
    for (auto& rank : ranks) {
      if (rank->device == device) return *rank;
    }
    std::string there;
    for (auto& rank : ranks) there += (there.empty() ? "" : ", ") + std::to_string(rank->device);
    throw Failure("the communicator has no rank on device " + std::to_string(device) +
                  " of this process, only on " + there);
  }

  void raise() {
    std::lock_guard<std::mutex> lock(state_);
    if (!error_.empty()) throw Failure(error_);
  }

  // The first failure is kept; the watchdog then aborts all ranks of this process.
  void fail(const std::string& text) {
    std::lock_guard<std::mutex> lock(state_);
    if (error_.empty()) error_ = text;
    failed_ = true;
    wake_.notify_all();
  }

  void start(int device, CUstream stream, Call call) {
    raise();
    Rank& rank = rank_on(device);
    Current current(rank.context);
    std::unique_lock<std::timed_mutex> lock(rank.mutex);
    raise();  // it may have been closed meanwhile
    const void* counters = call.counters;
    for (auto op = rank.waiting.begin(); op != rank.waiting.end();) {
      auto next = std::next(op);
      if (op->call.counters == counters) {  // left by a program that broke off
        rank.recycle(*op);
        rank.waiting.erase(op);
      }
      op = next;
    }
    rank.head();
    rank.waiting.emplace_back();
    auto op = std::prev(rank.waiting.end());
    op->call = std::move(call);
    op->number = rank.calls++;
    try {
      EventPool& events = rank.pool(*op);
      op->ready = events.take();
      if (op->call.trace && rank.base == nullptr) {
        rank.base = events.take();
        CUDA(EventRecord(rank.base, stream));
      }
      CUDA(MemsetD32(address(op->call.counters), 0, op->call.groups.size(), stream));
      CUDA(EventRecord(op->ready, stream));
      if (op->call.enqueue) enqueue(rank, op);
    } catch (const Failure& error) {
      abandon(rank, lock, counters, error.what());
      throw;
    }
  }

  void done(int device, CUstream stream, const Call& call) {
    Rank& rank = rank_on(device);
    Current current(rank.context);
    std::unique_lock<std::timed_mutex> lock(rank.mutex);
    auto same = [&](const Op& op) { return !op.awaited && op.call.counters == call.counters; };
    auto find = [&](std::list<Op>& ops) { return std::find_if(ops.begin(), ops.end(), same); };
    try {
      raise();
      auto op = find(rank.waiting);
      const bool waits = op != rank.waiting.end();
      if (!waits) op = find(rank.running);
      if (!waits && op == rank.running.end()) {
        throw Failure("done without its start, or XLA moved the counters between the two");
      }
      if (op->call.packed != call.packed || op->call.out != call.out) {
        throw Failure("XLA moved a buffer between start and done");
      }
      if (op->call.trace) {
        op->gemm_end = rank.pool(*op).take();
        CUDA(EventRecord(op->gemm_end, stream));
      }
      if (waits) {
        if (!call.enqueue) throw Failure("neither start nor done was told to enqueue");
        enqueue(rank, op);
      }
      op->awaited = true;
      {
        // On XLA's CPU this is where the handler waits. What is not joined stays.
        Unlocked unlocked(rank, lock);
        CUDA(StreamWaitEvent(stream, op->end, 0));
      }
      op->joined = true;
    } catch (const Failure& error) {
      abandon(rank, lock, call.counters, error.what());
      throw;
    }
  }

  void close() {
    const auto deadline = Clock::now() + Seconds(timeout_s);
    while (!failed_ && !idle() && Clock::now() < deadline) pause();
    if (!failed_ && !idle()) fail("closed while a collective was under way");
    stop();
    fail("the communicator is closed");
    std::vector<std::function<void()>> ends;
    for (auto& rank : ranks) {
      ends.push_back([self = shared_from_this(), &rank] {
        Current current(rank->context);
        if (rank->connected.exchange(false)) nccl.Destroy(rank->comm);
        self->free_rank(*rank);
      });
    }
    // Bounded: a peer that is gone must not keep this process from ending.
    wait(*launch_all(std::move(ends)), kAbortSeconds);
  }

  std::string trace() {
    std::string text = "[";
    for (auto& rank : ranks) {
      Current current(rank->context);
      std::lock_guard<std::timed_mutex> lock(rank->mutex);
      if (!failed_) rank->head();
      for (Op& op : rank->traced) {
        if (text.size() > 1) text += ",";
        text += json(*rank, op);
        rank->recycle(op);
      }
      rank->traced.clear();
    }
    return text + "]";
  }

  bool idle() {
    for (auto& rank : ranks) {
      Current current(rank->context);
      std::lock_guard<std::timed_mutex> lock(rank->mutex);
      if (rank->head() != nullptr) return false;
    }
    return true;
  }

 private:
  static std::string seconds(double value) {
    std::string text = std::to_string(value);
    text.erase(text.find_last_not_of('0') + 1);
    if (text.back() == '.') text.pop_back();
    return text + " s";
  }

  static std::string describe(const Rank& rank) {
    return "rank " + std::to_string(rank.rank) + " of " + std::to_string(rank.size) +
           " on device " + std::to_string(rank.device);
  }

  // A handler gives up: XLA takes the buffers back when it returns, so that the private stream must
  // have left them by then. The lock is of rank.mutex.
  void abandon(Rank& rank, std::unique_lock<std::timed_mutex>& lock, const void* counters,
               const std::string& text) {
    fail(describe(rank) + ": " + text);  // the watchdog aborts what is on the GPU
    auto ours = [&](const Op& op) { return op.call.counters == counters && !op.awaited; };
    for (auto op = rank.waiting.begin(); op != rank.waiting.end();) {
      auto next = std::next(op);
      if (ours(*op)) {
        rank.recycle(*op);
        rank.waiting.erase(op);
      }
      op = next;
    }
    auto op = std::find_if(rank.running.begin(), rank.running.end(), ours);
    if (op == rank.running.end()) return;
    release(rank, *op);
    const bool all = cuda.EventQuery(op->sent) == kNotReady;  // was it put there at all?
    CUevent last = all ? op->sent : rank.plain.take();
    if (!all) cuda.EventRecord(last, rank.stream);
    {
      Unlocked unlocked(rank, lock);  // for the watchdog, which lets calls before this one through
      const auto deadline = Clock::now() + Seconds(kAbortSeconds);
      while (cuda.EventQuery(last) == kNotReady && Clock::now() < deadline) pause();
      settle(rank.signals, kAbortSeconds);
      settle(rank.rescue, kAbortSeconds);
    }
    op->abandoned = true;
    if (!all) rank.plain.give(last);
  }

  // Ends the private stream's waits for tiles that will not come.
  static void release(Rank& rank, const Op& op) {
    cuda.MemsetD32(address(op.call.counters), static_cast<unsigned>(kReleased),
                   op.call.groups.size(), rank.rescue);
  }

  static void pause() { std::this_thread::sleep_for(std::chrono::milliseconds(1)); }

  void open_rank(Rank& rank, size_t warm_up_bytes) {
    int device;
    CUDA(DeviceGet(&device, rank.device));
    CUDA(PrimaryRetain(&rank.context, device));
    Current current(rank.context);
    int least, greatest;
    CUDA(PriorityRange(&least, &greatest));
    for (CUstream* stream : {&rank.stream, &rank.signals, &rank.rescue}) {
      CUDA(StreamCreate(stream, kStreamNonBlocking, greatest));
    }
    void* shown;
    CUDA(HostAlloc(&shown, kShownCounters * sizeof(int32_t), 0));
    rank.shown = static_cast<int32_t*>(shown);
    CUDA(MemAlloc(&rank.gate, sizeof(int32_t)));
    CUDA(MemsetD32(rank.gate, kReleased, 1, rank.rescue));
    if (!settle(rank.rescue, kAbortSeconds)) throw Failure("the gate cannot be set");
    Config own = config;
    check_nccl(nccl.InitRankConfig(&rank.comm, rank.size, rank.id, rank.rank, &own),
               "ncclCommInitRankConfig");
    rank.connected = true;
    raise();  // another rank may have failed meanwhile
    if (warm_up_bytes > 0) warm_up(rank, warm_up_bytes);
  }

  // Every collective once, small and large: NCCL connects and loads kernels when first asked to,
  // for each algorithm, and that takes longer than any step.
  void warm_up(Rank& rank, size_t bytes) {
    const size_t ranks = static_cast<size_t>(rank.size);
    CUDA(MemAlloc(&rank.scratch, 2 * bytes));
    CUDA(MemsetD8(rank.scratch, 0, 2 * bytes, rank.stream));
    char* packed = reinterpret_cast<char*>(rank.scratch);
    for (size_t size : {bytes / 64, bytes}) {
      for (auto collective :
           {Collective::kAllReduce, Collective::kReduceScatter, Collective::kAllToAll}) {
        const Group group{0, size / 2 / ranks * ranks, 0};
        if (group.count > 0) send(rank, collective, group, packed, packed + bytes, 9, 2);
      }
    }
    // Not a synchronisation, which no time-out could end.
    CUresult result;
    while ((result = cuda.StreamQuery(rank.stream)) == kNotReady) {
      raise();
      pause();
    }
    check_cuda(result, "warm-up");
    CUDA(MemFree(rank.scratch));
    rank.scratch = 0;
  }

  // The stock collective of one group goes onto the private stream, unless the rank is aborted.
  void send(Rank& rank, Collective collective, const Group& group, char* packed, char* out,
            int type, size_t item) {
    std::lock_guard<std::timed_mutex> lock(rank.in_nccl);
    raise();  // an aborted communicator is no more
    rank.busy_since = Clock::now().time_since_epoch().count();
    try {
      call_nccl(rank, collective, group, packed, out, type, item);
    } catch (...) {
      rank.busy_since = 0;
      throw;
    }
    rank.busy_since = 0;
  }

  static void call_nccl(Rank& rank, Collective collective, const Group& group, char* packed,
                        char* out, int type, size_t item) {
    const size_t share = group.count / static_cast<size_t>(rank.size);
    char* from = packed + group.offset * item;
    switch (collective) {
      case Collective::kAllReduce:
        check_nccl(nccl.AllReduce(from, from, group.count, type, kNcclSum, rank.comm, rank.stream),
                   "ncclAllReduce", rank.comm);
        return;
      case Collective::kReduceScatter:
        out += group.offset / static_cast<size_t>(rank.size) * item;
        check_nccl(nccl.ReduceScatter(from, out, share, type, kNcclSum, rank.comm, rank.stream),
                   "ncclReduceScatter", rank.comm);
        return;
      case Collective::kAllToAll:
        out += group.offset * item;
        check_nccl(nccl.GroupStart(), "ncclGroupStart", rank.comm);
        NcclResult result = 0;
        for (int peer = 0; peer < rank.size && result == 0; ++peer) {
          const size_t at = static_cast<size_t>(peer) * share * item;
          result = nccl.Send(from + at, share, type, peer, rank.comm, rank.stream);
          if (result == 0) result = nccl.Recv(out + at, share, type, peer, rank.comm, rank.stream);
        }
        const NcclResult ended = nccl.GroupEnd();  // also after an error: the group is the thread's
        check_nccl(result, "ncclSend/ncclRecv", rank.comm);
        check_nccl(ended, "ncclGroupEnd", rank.comm);
        return;
    }
  }

  // Moves `op` from waiting to running: waits and collectives go onto the private stream.
  void enqueue(Rank& rank, std::list<Op>::iterator op) {
    const Call& call = op->call;
    EventPool& events = rank.pool(*op);
    op->sent = events.take();
    op->end = events.take();
    // Tickets of calls that are under way are in order; far below kReleased, which is open to all.
    rank.tickets = rank.tickets % (kReleased / 2) + 1;
    op->ticket = rank.tickets;
    rank.running.splice(rank.running.end(), rank.waiting, op);
    CUDA(StreamWaitEvent(rank.stream, op->ready, 0));
    if (call.trace) watch_signals(rank, *op);
    auto record = [&](std::vector<CUevent>& list) {
      if (!call.trace) return;
      list.push_back(events.take());
      CUDA(EventRecord(list.back(), rank.stream));
    };
    for (size_t i = 0; i < call.groups.size(); ++i) {
      const Group& group = call.groups[i];
      CUDA(StreamWaitValue32(rank.stream, address(call.counters) + i * sizeof(int32_t),
                             static_cast<uint32_t>(group.target), kWaitGreaterOrEqual));
      record(op->starts);
      send(rank, call.collective, group, call.packed, call.out, call.type, call.item_bytes);
      record(op->ends);
    }
    if (call.trace) CUDA(StreamWaitEvent(rank.stream, op->watched, 0));
    CUDA(EventRecord(op->sent, rank.stream));
    CUDA(StreamWaitValue32(rank.stream, rank.gate, static_cast<uint32_t>(op->ticket),
                           kWaitGreaterOrEqual));
    CUDA(EventRecord(op->end, rank.stream));
  }

  static void watch_signals(Rank& rank, Op& op) {
    const Call& call = op.call;
    CUDA(StreamWaitEvent(rank.signals, op.ready, 0));
    for (size_t i = 0; i < call.groups.size(); ++i) {
      CUDA(StreamWaitValue32(rank.signals, address(call.counters) + i * sizeof(int32_t),
                             static_cast<uint32_t>(call.groups[i].target), kWaitGreaterOrEqual));
      op.signals.push_back(rank.timed.take());
      CUDA(EventRecord(op.signals.back(), rank.signals));
    }
    op.watched = rank.timed.take();
    CUDA(EventRecord(op.watched, rank.signals));
  }

  // -------------------------------------------------------------------------- watchdog

  void watch() {
    int mode = kCaptureRelaxed;  // so that its queries break no capture of XLA's
    cuda.ExchangeCaptureMode(&mode);
    const Seconds period(std::min(0.05, timeout_s / 8));
    std::unique_lock<std::mutex> lock(state_);
    while (!stopped_ && !failed_) {
      wake_.wait_for(lock, period, [&] { return stopped_ || failed_.load(); });
      if (stopped_ || failed_) break;
      lock.unlock();
      for (auto& rank : ranks) {
        try {
          inspect(*rank);
        } catch (const std::exception& error) {
          fail(describe(*rank) + ": " + error.what());
        }
      }
      lock.lock();
    }
    const bool failed = failed_;
    lock.unlock();
    if (failed) abort_all();
  }

  void inspect(Rank& rank) {
    const auto now = Clock::now();
    const int64_t busy = rank.busy_since;
    const Clock::duration in_call(now.time_since_epoch().count() - busy);
    if (busy != 0 && Seconds(in_call).count() > timeout_s) {
      throw Failure("a call of NCCL did not return within " + seconds(timeout_s) +
                    ": did a peer end, or never get here?");
    }
    if (rank.in_nccl.try_lock()) {
      NcclResult state = 0;
      const NcclResult result = nccl.GetAsyncError(rank.comm, &state);
      std::string detail = state == 0 ? "" : nccl.LastError(rank.comm);
      rank.in_nccl.unlock();
      check_nccl(result, "ncclCommGetAsyncError");
      if (state != 0 && state != kNcclInProgress) {
        throw Failure(std::string("NCCL: a collective failed: ") + nccl.ErrorString(state) +
                      (detail.empty() ? "" : " (" + detail + ")"));
      }
    }
    Current current(rank.context);
    std::unique_lock<std::timed_mutex> lock(rank.mutex, std::try_to_lock);
    if (!lock.owns_lock()) return;  // a handler is at work
    Op* op = rank.head();
    if (op == nullptr) return;
    const CUresult ready = cuda.EventQuery(op->ready);
    if (ready == kNotReady) return;  // XLA's stream has other work first
    check_cuda(ready, "cuEventQuery");
    if (!op->seen) {
      op->seen = true;
      op->since = now;
    } else if (Seconds(now - op->since).count() > timeout_s) {
      throw Failure(stuck(rank, *op));
    }
  }

  // What a call that takes too long is waiting for.
  std::string stuck(Rank& rank, const Op& op) {
    std::string text = std::string(name_of(op.call.collective)) + " number " +
                       std::to_string(op.number) + " is not complete after " + seconds(timeout_s);
    const size_t count = std::min(op.call.groups.size(), kShownCounters);
    if (cuda.CopyToHost(rank.shown, address(op.call.counters), count * sizeof(int32_t),
                        rank.rescue) != 0 ||
        !settle(rank.rescue, 1)) {
      return text;
    }
    for (size_t i = 0; i < count; ++i) {
      const int32_t target = op.call.groups[i].target;
      if (rank.shown[i] >= target) continue;
      return text + ": the GEMM signalled " + std::to_string(rank.shown[i]) + " of " +
             std::to_string(target) + " tiles of group " + std::to_string(i) + " of " +
             std::to_string(op.call.groups.size());
    }
    return text + ": every tile is signalled, so a peer is missing or stuck";
  }

  static bool settle(CUstream stream, double timeout) {
    const auto deadline = Clock::now() + Seconds(timeout);
    while (cuda.StreamQuery(stream) == kNotReady) {
      if (Clock::now() > deadline) return false;
      pause();
    }
    return true;
  }

  // Ends every collective of this process's ranks and lets XLA's streams go on, call by call; what
  // they then read is filled with the bytes 0xff, NaN in every floating-point type.
  void abort_all() {
    for (auto& rank : ranks) {
      Current current(rank->context);
      cuda.MemsetD32(rank->gate, 0, 1, rank->rescue);
      settle(rank->rescue, 1);
    }
    pause();  // who was just passing the gate is through
    // Freeing memory, NCCL may wait for all of the GPU, which may wait for what comes next.
    auto aborts = abort_ranks();
    Clock::time_point deadline = Clock::time_point::max();
    while (Clock::now() < deadline) {
      bool idle = true;
      for (auto& rank : ranks) {
        try {
          idle = pass(*rank) && idle;
        } catch (const std::exception&) {
          // A broken GPU: nothing on it can be helped.
        }
      }
      std::unique_lock<std::mutex> lock(state_);
      if (stopped_ && idle) break;
      if (stopped_ && deadline == Clock::time_point::max()) {
        deadline = Clock::now() + std::chrono::seconds(kAbortSeconds);
      }
      wake_.wait_for(lock, std::chrono::milliseconds(idle ? 50 : 1));
    }
    wait(*aborts, kAbortSeconds);
  }

  // After a failure: sees to the first call on the private stream. True if there is none.
  bool pass(Rank& rank) {
    Current current(rank.context);
    std::unique_lock<std::timed_mutex> lock(rank.mutex, std::try_to_lock);
    if (!lock.owns_lock()) return false;
    Op* op = rank.head();
    if (op == nullptr) return true;
    if (op->abandoned) {
      open(rank, *op);
      return false;
    }
    if (!op->awaited || cuda.EventQuery(op->ready) != 0) return false;
    const auto now = Clock::now();
    if (!op->seen) {
      op->seen = true;
      op->since = now;
    }
    // From here to the gate XLA's stream waits for this call: its buffers are ours.
    if (cuda.EventQuery(op->sent) != 0) {
      if (!op->released && Seconds(now - op->since).count() > std::min(timeout_s, 2.0)) {
        op->released = true;
        release(rank, *op);
      }
    } else if (!op->poisoned) {
      op->poisoned = true;
      cuda.MemsetD8(address(op->call.out), 0xff, op->call.out_bytes, rank.rescue);
      open(rank, *op);  // after it, on the same stream
    }
    return false;
  }

  static void open(Rank& rank, const Op& op) {
    cuda.MemsetD32(rank.gate, static_cast<unsigned>(op.ticket), 1, rank.rescue);
  }

  struct Jobs {
    std::mutex mutex;
    std::condition_variable changed;
    size_t left;
  };

  // Runs each in a thread of its own.
  static std::shared_ptr<Jobs> launch_all(std::vector<std::function<void()>> jobs) {
    auto running = std::make_shared<Jobs>();
    running->left = jobs.size();
    for (auto& job : jobs) {
      std::thread([running, job = std::move(job)] {
        try {
          job();
        } catch (const std::exception&) {
          // The first failure is what the user sees; this is its clearing up.
        }
        std::lock_guard<std::mutex> lock(running->mutex);
        running->left -= 1;
        running->changed.notify_all();
      }).detach();
    }
    return running;
  }

  static void wait(Jobs& jobs, double timeout) {
    std::unique_lock<std::mutex> lock(jobs.mutex);
    jobs.changed.wait_for(lock, Seconds(timeout), [&] { return jobs.left == 0; });
  }

  // Once, and only what is connected: another thread may still be in open_rank.
  static void abort(Rank& rank) {
    if (!rank.connected) return;
    Current current(rank.context);
    // A thread that is stuck in NCCL holds it, and only the abort lets it go on.
    std::unique_lock<std::timed_mutex> lock(rank.in_nccl, std::chrono::milliseconds(200));
    if (rank.connected.exchange(false)) nccl.Abort(rank.comm);
  }

  std::shared_ptr<Jobs> abort_ranks() {
    std::vector<std::function<void()>> jobs;
    for (auto& rank : ranks) {
      jobs.push_back([self = shared_from_this(), &rank] { abort(*rank); });
    }
    return launch_all(std::move(jobs));
  }

  void stop() {
    {
      std::lock_guard<std::mutex> lock(state_);
      stopped_ = true;  // an abort that is due still runs
      wake_.notify_all();
    }
    if (watchdog_.joinable()) watchdog_.join();
  }

  void free_rank(Rank& rank) {
    if (rank.context == nullptr) return;  // it was never opened
    Current current(rank.context);
    const std::chrono::seconds patience(kAbortSeconds);
    const auto deadline = Clock::now() + patience;
    std::unique_lock<std::timed_mutex> lock(rank.mutex, deadline);
    while (lock.owns_lock() && rank.unlocked > 0) {
      lock.unlock();
      pause();
      if (Clock::now() < deadline) lock.try_lock_until(deadline);
    }
    if (!lock.owns_lock()) return;
    // An abort that another thread has begun comes to its end first.
    std::unique_lock<std::timed_mutex> in_nccl(rank.in_nccl, patience);
    if (!in_nccl.owns_lock()) return;
    bool stuck = rank.head() != nullptr;
    if (rank.stream != nullptr && !settle(rank.stream, 1)) stuck = true;
    for (auto* ops : {&rank.waiting, &rank.running}) {
      for (Op& op : *ops) rank.recycle(op);
      ops->clear();
    }
    for (Op& op : rank.traced) rank.recycle(op);
    rank.traced.clear();
    rank.timed.give(rank.base);
    rank.plain.clear();
    rank.timed.clear();
    for (CUstream* stream : {&rank.stream, &rank.signals, &rank.rescue}) {
      if (*stream != nullptr) cuda.StreamDestroy(*stream);
      *stream = nullptr;
    }
    if (rank.shown != nullptr) cuda.HostFree(rank.shown);
    rank.shown = nullptr;
    for (CUdeviceptr* memory : {&rank.gate, &rank.scratch}) {
      if (*memory != 0 && !stuck) cuda.MemFree(*memory);
      *memory = 0;
    }
    // The context stays retained: XLA has it in any case.
  }

  static std::string json(const Rank& rank, const Op& op) {
    auto since = [](CUevent from, CUevent to) {
      float ms = 0;
      if (to == nullptr || cuda.EventElapsed(&ms, from, to) != 0) return std::string("null");
      return std::to_string(static_cast<double>(ms) * 1e3);
    };
    std::string text = "{\"device\":" + std::to_string(rank.device) +
                       ",\"rank\":" + std::to_string(rank.rank) +
                       ",\"number\":" + std::to_string(op.number) + ",\"collective\":\"" +
                       name_of(op.call.collective) +
                       "\",\"begin_us\":" + since(rank.base, op.ready) +
                       ",\"gemm_end_us\":" + since(op.ready, op.gemm_end) +
                       ",\"end_us\":" + since(op.ready, op.end) + ",\"groups\":[";
    for (size_t i = 0; i < op.call.groups.size(); ++i) {
      if (i > 0) text += ",";
      text += "{\"signal_us\":" + since(op.ready, op.signals[i]) +
              ",\"start_us\":" + since(op.ready, op.starts[i]) +
              ",\"end_us\":" + since(op.ready, op.ends[i]) +
              ",\"nbytes\":" + std::to_string(op.call.groups[i].count * op.call.item_bytes) + "}";
    }
    return text + "]}";
  }

  std::mutex state_;
  std::condition_variable wake_;
  std::string error_;
  std::atomic<bool> failed_{false};
  bool stopped_ = false;
  std::thread watchdog_;
};

std::mutex table_mutex;
// Never destroyed: at the end of the process threads that are stuck in NCCL may still hold ranks.
std::map<int64_t, std::shared_ptr<Communicator>>& table() {
  static auto* communicators = new std::map<int64_t, std::shared_ptr<Communicator>>();
  return *communicators;
}
int64_t next_id = 1;

std::shared_ptr<Communicator> communicator(int64_t id) {
  std::lock_guard<std::mutex> lock(table_mutex);
  auto found = table().find(id);
  if (found == table().end()) {
    throw Failure("communicator " + std::to_string(id) + " is closed or of another process");
  }
  return found->second;
}

// ------------------------------------------------------------------------------ FFI handlers

using Numbers = ffi::Span<const int64_t>;

Call make_call(Communicator& communicator, int device, std::string_view collective,
               Numbers offsets, Numbers counts, Numbers targets, bool enqueue, bool trace,
               ffi::AnyBuffer packed, ffi::AnyBuffer counters, const ffi::AnyBuffer* out) {
  Call call;
  call.collective = collective_of(collective);
  call.type = nccl_type(packed.element_type());
  call.item_bytes = ffi::ByteWidth(packed.element_type());
  call.packed = static_cast<char*>(packed.untyped_data());
  call.counters = counters.untyped_data();
  call.enqueue = enqueue;
  call.trace = trace;
  const size_t ranks = static_cast<size_t>(communicator.rank_on(device).size);
  const size_t elements = packed.element_count();
  if (counts.size() != offsets.size() || targets.size() != offsets.size() || counts.size() == 0) {
    throw Failure("offsets, counts and targets must have the same length, at least 1");
  }
  if (counters.element_type() != ffi::DataType::S32 || counters.element_count() != counts.size()) {
    throw Failure("counters must be int32, one for each of " + std::to_string(counts.size()) +
                  " groups");
  }
  size_t end = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    const int64_t offset = offsets[i], count = counts[i], target = targets[i];
    // In order and apart: groups on one stream then never touch the same element.
    if (count < 1 || offset < 0 || static_cast<size_t>(offset) < end ||
        static_cast<size_t>(offset) > elements ||
        static_cast<size_t>(count) > elements - static_cast<size_t>(offset)) {
      throw Failure("group " + std::to_string(i) + " (offset " + std::to_string(offset) +
                    ", count " + std::to_string(count) + ") does not lie in the " +
                    std::to_string(elements) + " elements after the group before it");
    }
    if (target < 1 || target > kReleased) {
      throw Failure("group " + std::to_string(i) + " waits for " + std::to_string(target) +
                    " tiles");
    }
    const bool shared = call.collective != Collective::kAllReduce;
    if (shared && (static_cast<size_t>(count) % ranks || static_cast<size_t>(offset) % ranks)) {
      throw Failure("group " + std::to_string(i) + " cannot be shared out to " +
                    std::to_string(ranks) + " ranks");
    }
    end = static_cast<size_t>(offset + count);
    call.groups.push_back({static_cast<size_t>(offset), static_cast<size_t>(count),
                           static_cast<int32_t>(target)});
  }
  if ((out == nullptr) != (call.collective == Collective::kAllReduce)) {
    throw Failure("an all-reduce is in place; the other collectives need a buffer for the result");
  }
  call.out = call.packed;
  call.out_bytes = packed.size_bytes();
  if (out != nullptr) {
    const size_t expected =
        call.collective == Collective::kReduceScatter ? elements / ranks : elements;
    if (out->element_type() != packed.element_type() || out->element_count() != expected) {
      throw Failure("the result has " + std::to_string(out->element_count()) + " elements, not " +
                    std::to_string(expected) + " of the packed buffer's dtype");
    }
    call.out = static_cast<char*>(out->untyped_data());
    call.out_bytes = out->size_bytes();
  }
  return call;
}

ffi::Error start(CUstream stream, int32_t device, int64_t id, std::string_view collective,
                 Numbers offsets, Numbers counts, Numbers targets, bool enqueue, bool trace,
                 ffi::RemainingArgs, ffi::Result<ffi::AnyBuffer> packed,
                 ffi::Result<ffi::AnyBuffer> counters, ffi::RemainingRets rets) {
  return guarded("native.overlap", [&] {
    auto found = communicator(id);
    std::unique_ptr<ffi::AnyBuffer> out;
    if (rets.size() > 0) out = std::make_unique<ffi::AnyBuffer>(**rets.get<ffi::AnyBuffer>(0));
    found->start(device, stream,
                 make_call(*found, device, collective, offsets, counts, targets, enqueue, trace,
                           *packed, *counters, out.get()));
  });
}

ffi::Error done(CUstream stream, int32_t device, int64_t id, std::string_view collective,
                Numbers offsets, Numbers counts, Numbers targets, bool enqueue, bool trace,
                ffi::AnyBuffer packed, ffi::AnyBuffer counters, ffi::RemainingArgs args,
                ffi::Result<ffi::AnyBuffer> packed_after,
                ffi::Result<ffi::AnyBuffer> counters_after, ffi::RemainingRets rets) {
  return guarded("native.overlap", [&] {
    auto found = communicator(id);
    if (packed_after->untyped_data() != packed.untyped_data() ||
        counters_after->untyped_data() != counters.untyped_data() || args.size() != rets.size()) {
      throw Failure("the results of done must alias its arguments");
    }
    std::unique_ptr<ffi::AnyBuffer> out;
    if (args.size() > 0) {
      out = std::make_unique<ffi::AnyBuffer>(*args.get<ffi::AnyBuffer>(0));
      if ((*rets.get<ffi::AnyBuffer>(0))->untyped_data() != out->untyped_data()) {
        throw Failure("the results of done must alias its arguments");
      }
    }
    found->done(device, stream,
                make_call(*found, device, collective, offsets, counts, targets, enqueue, trace,
                          packed, counters, out.get()));
  });
}

template <typename Binding>
auto with_attributes(Binding&& binding) {
  return std::move(binding)
      .template Attr<int64_t>("communicator")
      .template Attr<std::string_view>("collective")
      .template Attr<Numbers>("offsets")
      .template Attr<Numbers>("counts")
      .template Attr<Numbers>("targets")
      .template Attr<bool>("enqueue")
      .template Attr<bool>("trace");
}

template <typename Binding>
auto start_binding(Binding&& binding) {
  return with_attributes(std::move(binding))
      .RemainingArgs()
      .template Ret<ffi::AnyBuffer>()
      .template Ret<ffi::AnyBuffer>()
      .RemainingRets();
}

template <typename Binding>
auto done_binding(Binding&& binding) {
  return with_attributes(std::move(binding))
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .RemainingArgs()
      .template Ret<ffi::AnyBuffer>()
      .template Ret<ffi::AnyBuffer>()
      .RemainingRets();
}

auto on_cuda() {
  return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<CUstream>>().Ctx<ffi::DeviceOrdinal>();
}

// XLA's CPU has no stream: what is put on the null one has happened when the call returns.
auto on_cpu() { return ffi::Ffi::Bind().Ctx<ffi::DeviceOrdinal>(); }

template <typename... Args>
ffi::Error start_on_cpu(int32_t device, Args... args) {
  return start(nullptr, device, std::move(args)...);
}
template <typename... Args>
ffi::Error done_on_cpu(int32_t device, Args... args) {
  return done(nullptr, device, std::move(args)...);
}

}  // namespace

// None has the trait kCmdBufferCompatible: a CUDA graph would run them once, at capture.
XLA_FFI_DEFINE_HANDLER_SYMBOL(JpdOverlapStart, start, start_binding(on_cuda()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(JpdOverlapDone, done, done_binding(on_cuda()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    JpdOverlapStartCpu,
    (start_on_cpu<int64_t, std::string_view, Numbers, Numbers, Numbers, bool, bool,
                  ffi::RemainingArgs, ffi::Result<ffi::AnyBuffer>, ffi::Result<ffi::AnyBuffer>,
                  ffi::RemainingRets>),
    start_binding(on_cpu()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(
    JpdOverlapDoneCpu,
    (done_on_cpu<int64_t, std::string_view, Numbers, Numbers, Numbers, bool, bool, ffi::AnyBuffer,
                 ffi::AnyBuffer, ffi::RemainingArgs, ffi::Result<ffi::AnyBuffer>,
                 ffi::Result<ffi::AnyBuffer>, ffi::RemainingRets>),
    done_binding(on_cpu()));

// ------------------------------------------------------------------------------ for Python
// Functions return -1 on failure; jpd_overlap_message() then says why, in the same thread.

extern "C" {

const char* jpd_overlap_message() { return message.c_str(); }

int64_t jpd_overlap_load(const char* cuda_path, const char* nccl_path) {
  return reported([&]() -> int64_t {
    if (!loaded) {
      load(cuda_path, nccl_path);
    }
    return 0;
  });
}

int64_t jpd_overlap_unique_id(char* id) {
  return reported([&]() -> int64_t {
    UniqueId made;
    check_nccl(nccl.GetUniqueId(&made), "ncclGetUniqueId");
    std::memcpy(id, made.internal, sizeof(made.internal));
    return 0;
  });
}

// `ids` holds 128 bytes for each of the `count` ranks of this process.
int64_t jpd_overlap_create(int count, const int* devices, const int* ranks, const int* sizes,
                           const char* ids, int cga_cluster_size, int min_ctas, int max_ctas,
                           double timeout_s, double init_timeout_s, uint64_t warm_up_bytes) {
  return reported([&]() -> int64_t {
    auto made = std::make_shared<Communicator>();
    made->timeout_s = timeout_s;
    made->config.cga_cluster_size = cga_cluster_size;
    made->config.min_ctas = min_ctas > 0 ? min_ctas : kUndefined;
    made->config.max_ctas = max_ctas > 0 ? max_ctas : kUndefined;
    for (int i = 0; i < count; ++i) {
      auto rank = std::make_unique<Rank>();
      rank->device = devices[i];
      rank->rank = ranks[i];
      rank->size = sizes[i];
      std::memcpy(rank->id.internal, ids + i * sizeof(UniqueId), sizeof(UniqueId));
      made->ranks.push_back(std::move(rank));
    }
    made->open(init_timeout_s, warm_up_bytes);
    std::lock_guard<std::mutex> lock(table_mutex);
    table()[next_id] = made;
    return next_id++;
  });
}

int64_t jpd_overlap_check(int64_t id) {
  return reported([&]() -> int64_t {
    communicator(id)->raise();
    return 0;
  });
}

int64_t jpd_overlap_idle(int64_t id) {
  return reported([&]() -> int64_t {
    auto found = communicator(id);
    found->raise();
    return found->idle() ? 1 : 0;
  });
}

int64_t jpd_overlap_fail(int64_t id, const char* text) {
  return reported([&]() -> int64_t {
    communicator(id)->fail(text);
    return 0;
  });
}

// JSON in message().
int64_t jpd_overlap_trace(int64_t id) {
  return reported([&]() -> int64_t {
    message = communicator(id)->trace();
    return 0;
  });
}

int64_t jpd_overlap_close(int64_t id) {
  return reported([&]() -> int64_t {
    std::shared_ptr<Communicator> found = communicator(id);
    {
      std::lock_guard<std::mutex> lock(table_mutex);
      table().erase(id);
    }
    found->close();
    return 0;
  });
}

}  // extern "C"
