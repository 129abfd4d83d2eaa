// Streams with their worker threads, events, and the check that accesses are ordered.
#pragma once
#include "state.h"

// ---- race check
// Starts an operation on s: everything the host has waited for, and everything before it on s, is ordered
// before it. (G.mu held)
static void tick(Stream& s) {
  s.vc.merge(G.host);
  s.vc.tick(size_t(s.id));
}

// Notes an access of s's current operation and compares it with the earlier ones. (G.mu held)
static void touch(Mem& m, uintptr_t lo, uintptr_t hi, bool write, Stream& s, const std::string& what) {
  std::vector<Access> keep;
  for (auto& a : m.acc) {
    bool overlap = a.lo < hi && lo < a.hi,
         ordered = a.stream == s.id || s.vc.get(size_t(a.stream)) >= a.clock;
    if (overlap && !ordered && (write || a.write))
      hazard(write ? (a.write ? RACE_WAW : RACE_WAR) : RACE_RAW,
             what + " on stream " + std::to_string(s.id) + " is not ordered after " + a.what + " on stream " +
                 std::to_string(a.stream) + " (" + std::to_string(hi - lo) + " bytes)");
    bool covered = lo <= a.lo && a.hi <= hi;
    if (!(ordered && covered && (write || !a.write))) keep.push_back(std::move(a));
  }
  keep.push_back({lo, hi, s.id, s.vc.get(size_t(s.id)), write, what});
  if (keep.size() > 512) keep.erase(keep.begin());
  m.acc = std::move(keep);
}

// ---- streams
// below: what the end of a job means to the host memory it used
static void bury(Job& j);
static void worker(Stream* s) {
  prctl(PR_SET_TIMERSLACK, 1UL, 0, 0, 0);
  Lock l(G.mu);
  for (;;) {
    G.cv.wait(l, [&] { return !s->q.empty(); });
    Job j = std::move(s->q.front());
    s->q.pop_front();
    catch_up(j.submitted);
    if (j.wait) {
      G.cv.wait(l, [&] { return j.wait->done; });
      catch_up(j.wait->t);
    }
    l.unlock();
    std::string err;
    try {
      if (j.fn) j.fn();
    } catch (const std::exception& e) {
      err = e.what();
    }
    j.fn = nullptr;
    l.lock();
    if (!err.empty() && G.error.empty()) G.error = err;
    for (auto& m : j.mems) {
      if (--m->pend[s->id] == 0) m->pend.erase(s->id);
      if (j.h2d && m->owner == s->id) m->copies--;
    }
    bury(j);
    EvP signal = j.signal;
    // memory is given back without the lock, and before anyone is told
    l.unlock();
    {
      Job drop = std::move(j);
    }
    l.lock();
    if (signal) {
      signal->done = true;
      signal->t = now();
    }
    s->completed++;
    s->idle_since = now();
    G.cv.notify_all();
  }
}
// G.mu held
static uint64_t enqueue(Stream& s, Job&& j) {
  for (auto& m : j.mems) {
    m->pend[s.id]++;
    if (j.h2d && m->owner == s.id) m->copies++;
  }
  if (j.pin) j.pin->pend++;
  if (j.reg) {
    auto it = G.pins.find(j.reg);
    if (it != G.pins.end()) it->second.pend++;
  }
  j.submitted = now();
  s.q.push_back(std::move(j));
  if (!s.started) {
    s.started = true;
    std::thread(worker, &s).detach();
  }
  G.cv.notify_all();
  return ++s.submitted;
}
// Drops host memory that finished jobs held; only ever on a thread that is not a worker, without G.mu.
static void reap() {
  std::vector<c10::Storage> g;
  {
    Lock l(G.mu);
    g.swap(G.graves);
  }
}
static void raise_error(Lock& l) {
  if (!G.error.empty()) {
    std::string e;
    e.swap(G.error);
    l.unlock();
    TORCH_CHECK(false, "simgpu: error in queued work: ", e);
  }
}

// the calling thread blocks until `done`, which happened at `ended`; NoGil must be in force already
template <class P>
static void host_wait(Lock& l, double& account, P done, const double& ended) {
  double t = now();
  if (!done()) {
    G.waits++;
    G.cv.wait(l, done);
  }
  catch_up(ended);
  account += now() - t;
}
static void wait_seq(int64_t id, uint64_t seq, double& account) {
  NoGil n;
  Lock l(G.mu);
  auto& s = stream(id);
  host_wait(l, account, [&] { return s.completed >= seq; }, s.idle_since);
}
static void sync_stream(int64_t id) {
  {
    NoGil n;
    Lock l(G.mu);
    auto& s = stream(id);
    uint64_t seq = s.submitted;
    VC vc = s.vc;
    host_wait(l, G.wait_s, [&] { return s.completed >= seq; }, s.idle_since);
    G.host.merge(vc);
    raise_error(l);
  }
  reap();
}
static void sync_device() {
  size_t n;
  {
    Lock l(G.mu);
    n = G.streams.size();
  }
  for (size_t i = 0; i < n; i++) sync_stream(int64_t(i));
}
static int64_t new_stream(int priority) {
  Lock l(G.mu);
  int64_t id = int64_t(G.streams.size());
  G.streams.push_back(std::make_unique<Stream>(Stream{id, priority}));
  return id;
}

// ---- events
static void ev_record(Event& e, int64_t id) {
  Lock l(G.mu);
  auto& s = stream(id);
  e.cur = std::make_shared<EvState>();
  e.cur->stream = id;
  s.vc.merge(G.host);
  e.cur->vc = s.vc;
  if (is_async(s)) {
    Job j;
    j.signal = e.cur;
    enqueue(s, std::move(j));
  } else {
    e.cur->done = true;
    e.cur->t = now();
  }
}
// stream id goes on only after the event; a synchronous stream blocks the host
static void ev_block(Event& e, int64_t id) {
  if (!e.cur) return;
  EvP c = e.cur;
  NoGil n;
  Lock l(G.mu);
  auto& s = stream(id);
  s.vc.merge(c->vc);
  if (is_async(s)) {
    if (!c->done || virtual_era) {
      Job j;
      j.wait = c;
      enqueue(s, std::move(j));
    }
  } else host_wait(l, G.wait_s, [&] { return c->done; }, c->t);
}
static bool ev_query(Event& e) {
  if (!e.cur) return true;
  Lock l(G.mu);
  if (e.cur->done) G.host.merge(e.cur->vc);
  return e.cur->done;
}
static void ev_sync(Event& e) {
  if (!e.cur) return;
  {
    EvP c = e.cur;
    NoGil n;
    Lock l(G.mu);
    host_wait(l, G.wait_s, [&] { return c->done; }, c->t);
    G.host.merge(c->vc);
    raise_error(l);
  }
  reap();
}
static double ev_elapsed_ms(const Event* a, const Event* b) {
  TORCH_CHECK_VALUE(a && b && a->cur && b->cur,
                    "Both events must be recorded before calculating elapsed time.");
  Lock l(G.mu);
  TORCH_CHECK(a->cur->done && b->cur->done, "simgpu error: device not ready");
  return (b->cur->t - a->cur->t) * 1e3;
}
