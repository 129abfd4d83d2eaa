// Settings, and the state that everything else shares.
#pragma once
#include <torch/extension.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/EmptyTensor.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/unfold_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/prctl.h>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <unordered_set>

using at::Tensor;
using c10::IValue;
static constexpr auto PU = c10::DeviceType::PrivateUse1;
static const c10::Device DEV(PU, 0);

// ---- time, settings
static double wall() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
// Virtual time: nothing sleeps; every thread has a clock of its own that what takes time moves on, and that
// waiting for another thread's work moves to where that work ended. It starts anew, at the wall's time, with
// every switch (`era`).
static std::atomic<int> virtual_era{0};  // 0 = real time
static std::atomic<double> virtual_start{0};
static double& thread_clock() {
  static thread_local double clock = 0;
  static thread_local int era = 0;
  if (era != virtual_era) {
    era = virtual_era;
    clock = virtual_start;
  }
  return clock;
}
static double now() { return virtual_era ? thread_clock() : wall(); }
// The thread has waited for something that ended at t.
static void catch_up(double t) {
  if (virtual_era) thread_clock() = std::max(thread_clock(), t);
}
// sleeps, then spins over the last bit, so that short copies are timed well too
static void wait_until(double t) {
  if (virtual_era) {
    catch_up(t);
    return;
  }
  double d = t - now();
  if (d > 150e-6) std::this_thread::sleep_for(std::chrono::duration<double>(d - 80e-6));
  while (now() < t) std::this_thread::yield();
}
static double env(const char* name, double dflt) {
  const char* s = std::getenv(name);
  return s && *s ? std::atof(s) : dflt;
}

// bandwidths in bytes/s, 0 = as fast as memcpy
struct Config {
  size_t total = size_t(env("SIMGPU_TOTAL_MB", 8192) * 1048576.0);
  double h2d = env("SIMGPU_H2D_GBPS", 4) * 1e9;
  double d2h = env("SIMGPU_D2H_GBPS", env("SIMGPU_H2D_GBPS", 4)) * 1e9;
  double pageable = env("SIMGPU_PAGEABLE_GBPS", 2) * 1e9;
  double latency = env("SIMGPU_LATENCY_US", 20) * 1e-6;  // per copy
  double op_seconds = env("SIMGPU_OP_US", 0) * 1e-6;     // added to every compute op
  // >1: a compute op takes that many times its CPU time
  double op_factor = env("SIMGPU_OP_FACTOR", 1);
  // byte written to free and fresh device memory; -1 = off
  int poison = int(env("SIMGPU_POISON", 0xC5));
  size_t pin_limit =
      env("SIMGPU_PIN_LIMIT_MB", 0) > 0 ? size_t(env("SIMGPU_PIN_LIMIT_MB", 0) * 1048576.0) : ~size_t(0);
  // pinned blocks are charged rounded up to a power of two, as CUDA's host allocator does
  bool pin_pow2 = env("SIMGPU_PIN_POW2", 0) != 0;
  bool cache_counts = env("SIMGPU_CACHE_COUNTS", 0) !=
                      0;  // cached (freed) device blocks lower mem_get_info()'s free bytes, as on CUDA
  // the default stream is a queue with a worker thread as well
  bool async_compute = env("SIMGPU_ASYNC", 0) != 0;
  // a compute op that mixes device tensors and CPU tensors (dim > 0) raises
  bool strict = env("SIMGPU_STRICT", 1) != 0;
  // see thread_clock()
  bool virtual_time = env("SIMGPU_VIRTUAL_TIME", 0) != 0;
  // device blocks are charged in multiples of this
  size_t round = 512;
  // most bytes of freed blocks kept for reuse
  size_t cache_max = size_t(env("SIMGPU_CACHE_MB", 1024) * 1048576.0);
};

// ---- state
// a vector clock: entry i = number of operations of stream i known to be ordered before
struct VC : std::vector<uint64_t> {
  uint64_t get(size_t i) const { return i < size() ? (*this)[i] : 0; }
  void merge(const VC& o) {
    if (o.size() > size()) resize(o.size());
    for (size_t i = 0; i < o.size(); i++) (*this)[i] = std::max((*this)[i], o[i]);
  }
  uint64_t tick(size_t i) {
    if (i >= size()) resize(i + 1);
    return ++(*this)[i];
  }
};
struct Access {
  uintptr_t lo, hi;
  int64_t stream;
  uint64_t clock;
  bool write;
  std::string what;
};
// a piece of device memory; lives on through frees and reuses
struct Mem {
  char* p;
  size_t cap;
  int64_t owner;                // owner: the stream it was allocated on
  std::vector<Access> acc;      // the latest accesses, for the race check
  std::map<int64_t, int> pend;  // jobs still queued, by stream
  // host->device copies among them, on the owner stream
  int copies = 0;
  ~Mem() { std::free(p); }
};
using MemP = std::shared_ptr<Mem>;
// What a DataPtr owns. recorded: streams given to record_stream; quiet: a temporary of copy_from, expected to
// be freed early.
struct Block {
  MemP mem;
  size_t n, charged;
  std::set<int64_t> recorded;
  bool quiet = false;
};
struct Pin {
  char* p;
  size_t n, charged;
  int pend = 0;
  bool freed = false;
  ~Pin();
};
using PinP = std::shared_ptr<Pin>;
// a pinned range; pin is null for host_register'ed memory
struct Range {
  size_t n;
  PinP pin;
  int pend = 0;
};
struct EvState {
  bool done = false;
  double t = 0;
  VC vc;
  int64_t stream = 0;
};
using EvP = std::shared_ptr<EvState>;
struct Event {
  EvP cur;
};
struct Job {
  std::function<void()> fn;
  EvP wait, signal;  // wait before fn, signal after it
  double submitted = 0;
  // device memory it touches (kept alive, counted as pending)
  std::vector<MemP> mems;
  // pinned host memory it reads or writes (kept alive)
  PinP pin;
  // other host memory; may be owned by Python, so a worker never drops it (G.graves)
  c10::Storage keep;
  // start of the host_register'ed range it uses
  uintptr_t reg = 0;
  bool h2d = false;
};
enum Kind { H2D_PINNED, H2D_PAGEABLE, D2H_PINNED, D2H_PAGEABLE, D2D, NKIND };
static const char* KIND[NKIND] = {"h2d_pinned", "h2d_pageable", "d2h_pinned", "d2h_pageable", "d2d"};
struct Counters {
  uint64_t n[NKIND] = {}, bytes[NKIND] = {}, ops = 0, deferred = 0, drained = 0;
};
struct Stream {
  int64_t id;
  int priority;
  std::deque<Job> q;
  uint64_t submitted = 0, completed = 0;
  bool started = false;
  double idle_since = 0;  // when its last finished job ended
  VC vc;
  Counters c;
};
enum Hazard {
  USE_AFTER_FREE,
  FREE_UNORDERED,
  FREED_IN_FLIGHT,
  PINNED_FREED,
  REGISTERED_FREED,
  STAGING_CHANGED,
  RACE_RAW,
  RACE_WAR,
  RACE_WAW,
  NHAZ
};
static const char* HAZ[NHAZ] = {"use_after_free",
                                "free_unordered",
                                "freed_in_flight_same_stream",
                                "pinned_freed_in_flight",
                                "registered_freed_in_flight",
                                "staging_overwritten",
                                "race_read_after_write",
                                "race_write_after_read",
                                "race_write_after_write"};
// a free that record_stream put off
struct Deferred {
  MemP mem;
  size_t charged;
  std::vector<std::pair<int64_t, uint64_t>> until;
  VC vc;
};
struct Engine {
  std::mutex mu;
  double busy = 0, free_at = 0;
};

struct Global {
  std::mutex mu;
  std::condition_variable cv;
  Config cfg;
  std::vector<std::unique_ptr<Stream>> streams;
  VC host;  // what the host has synchronised with
  size_t allocated = 0, peak_allocated = 0, active = 0, peak_active = 0, cached = 0, pinned = 0,
         peak_pinned = 0, registered = 0;
  uint64_t n_alloc = 0, n_free = 0, n_oom = 0, n_defer_waits = 0;
  std::deque<MemP> cache;
  std::deque<Deferred> deferred;
  std::map<uintptr_t, Range> pins;
  std::vector<c10::Storage> graves;
  uint64_t haz[NHAZ] = {};
  std::deque<std::string> log;
  Engine h2d, d2h;
  double wait_s = 0, blocked_copy_s = 0, compute_s = 0, busy_s = 0;
  uint64_t waits = 0;
  // counts down to the allocation / copy that fails; 0 = none
  int64_t fail_pin = 0, fail_dev = 0, fail_copy = 0;
  // operators whose meta kernel failed: how often, what it said
  std::map<std::string, std::pair<int, std::string>> not_deferred;
  // an error in queued work, or left behind by a failed call, raised at the next synchronisation
  std::string error;
  Global() { streams.push_back(std::make_unique<Stream>(Stream{0, 0})); }
};
// never destroyed: workers may outlive static destruction
static Global& G = *new Global;
static thread_local int64_t tl_stream = 0;
// >0: copies are part of at::native::cpu_fallback, no transfers
static thread_local int tl_raw = 0;

using Lock = std::unique_lock<std::mutex>;
static Stream& stream(int64_t id) { return *G.streams.at(size_t(id)); }
static bool is_async(const Stream& s) { return s.id != 0 || G.cfg.async_compute; }

// gives up the GIL, where this thread holds it, for as long as it may block
struct NoGil {
  PyThreadState* t = nullptr;
  NoGil() {
    if (Py_IsInitialized() && PyGILState_Check()) t = PyEval_SaveThread();
  }
  ~NoGil() {
    if (t) PyEval_RestoreThread(t);
  }
};

// G.mu held
static void hazard(Hazard h, const std::string& text) {
  G.haz[h]++;
  G.log.push_back(std::string(HAZ[h]) + ": " + text);
  if (G.log.size() > 200) G.log.pop_front();
}
