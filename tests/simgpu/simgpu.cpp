// simgpu: a simulated accelerator for PyTorch (PrivateUse1), made to test code that swaps weights
// between host and device. README.md has the user's view; this is how it works.
//
// * "Device" memory is ordinary host memory that is counted against a capacity and handed out by a
//   small caching allocator (a freed block is reused at once by the next allocation of that size on
//   the same stream, as CUDA's allocator does). Free and fresh memory holds a poison byte. (memory.h)
// * Every stream except the default one is a FIFO queue with its own worker thread. The default
//   stream runs its work at once, on the calling thread ("synchronous compute"), unless async_compute
//   is on, in which case it is a queue like the others. (streams.h)
// * Transfers go through one H2D and one D2H copy engine (a lock each), paced chunk by chunk to the
//   configured bandwidth. (transfers.h)
// * Compute is done by the CPU kernels on aliases of the device memory: no copies in, one copy out.
//   On an asynchronous stream compute is enqueued too: the shapes of the results come from the meta
//   kernels. (compute.h, elementwise.h, fallback.h)
// * Because synchronous compute is never "late", some real ordering bugs could not corrupt data here.
//   So every access to device memory is also checked with vector clocks as if all streams were
//   asynchronous: accesses that nothing orders are counted as races. (touch() in streams.h)
//
// Locking: G.mu guards all shared state; it is never held while a kernel or a transfer runs, nor
// while the Python GIL is being taken. Worker threads never need the GIL: queued jobs hold no object
// that Python may own (see Job::keep for the one exception and its way out).
//
// The headers are parts of this one translation unit, each including the one before it.
#include "backend.h"

// ---- Python's view
using Dict = std::map<std::string, double>;
static void add_counters(Dict& d, const Counters& c) {
  for (int k = 0; k < NKIND; k++) {
    d[std::string(KIND[k]) + "_n"] += double(c.n[k]);
    d[std::string(KIND[k]) + "_bytes"] += double(c.bytes[k]);
  }
  d["ops"] += double(c.ops);
  d["ops_deferred"] += double(c.deferred);
  d["ops_drained"] += double(c.drained);
}
static Dict stats() {
  Lock l(G.mu);
  Dict d;
  for (auto& s : G.streams) add_counters(d, s->c);
  d["h2d_engine_busy_s"] = G.h2d.busy;
  d["d2h_engine_busy_s"] = G.d2h.busy;
  d["host_wait_s"] = G.wait_s;
  d["host_waits"] = double(G.waits);
  d["host_blocked_copy_s"] = G.blocked_copy_s;
  d["compute_s"] = G.compute_s;
  d["busy_s"] = G.busy_s;
  d["device_bytes"] = double(G.active);
  d["device_allocated_bytes"] = double(G.allocated);
  d["peak_device_bytes"] = double(G.peak_active);
  d["peak_allocated_bytes"] = double(G.peak_allocated);
  d["cached_bytes"] = double(G.cached);
  d["pinned_bytes"] = double(G.pinned);
  d["registered_bytes"] = double(G.registered);
  d["peak_pinned_bytes"] = double(G.peak_pinned);
  d["allocs"] = double(G.n_alloc);
  d["frees"] = double(G.n_free);
  d["ooms"] = double(G.n_oom);
  d["deferred_frees"] = double(G.deferred.size());
  d["oom_waits"] = double(G.n_defer_waits);
  return d;
}
static std::map<int64_t, Dict> stream_stats() {
  Lock l(G.mu);
  std::map<int64_t, Dict> o;
  for (auto& s : G.streams) {
    auto& d = o[s->id];
    add_counters(d, s->c);
    d["queued"] = double(s->submitted - s->completed);
  }
  return o;
}
static void reset_stats() {
  Lock l(G.mu);
  for (auto& s : G.streams) s->c = Counters();
  G.h2d.busy = G.d2h.busy = G.wait_s = G.blocked_copy_s = G.compute_s = G.busy_s = 0;
  G.waits = G.n_alloc = G.n_free = G.n_oom = G.n_defer_waits = 0;
  G.peak_allocated = G.allocated;
  G.peak_active = G.active;
  G.peak_pinned = G.pinned + G.registered;
}
static std::map<std::string, uint64_t> hazards() {
  Lock l(G.mu);
  std::map<std::string, uint64_t> o;
  for (int i = 0; i < NHAZ; i++) o[HAZ[i]] = G.haz[i];
  return o;
}
static void set_async(bool on) {
  sync_device();
  Lock l(G.mu);
  G.cfg.async_compute = on;
}
static void set_virtual_time(bool on) {
  static int eras = 0;
  sync_device();
  Lock l(G.mu);
  if (on == G.cfg.virtual_time && on == (virtual_era != 0)) return;
  G.cfg.virtual_time = on;
  G.h2d.free_at = G.d2h.free_at = 0;
  for (auto& s : G.streams) s->idle_since = 0;
  virtual_start = wall();
  virtual_era = on ? ++eras : 0;
}
static Dict get_config() {
  Lock l(G.mu);
  auto& c = G.cfg;
  return {{"total", double(c.total)},
          {"h2d", c.h2d},
          {"d2h", c.d2h},
          {"pageable", c.pageable},
          {"latency", c.latency},
          {"op_seconds", c.op_seconds},
          {"op_factor", c.op_factor},
          {"poison", double(c.poison)},
          {"pin_limit", double(c.pin_limit)},
          {"pin_pow2", double(c.pin_pow2)},
          {"cache_counts", double(c.cache_counts)},
          {"async_compute", double(c.async_compute)},
          {"virtual_time", double(c.virtual_time)},
          {"strict", double(c.strict)},
          {"cache_max", double(c.cache_max)}};
}
static void set_config(const std::string& k, double v) {
  if (k == "async_compute") {
    set_async(v != 0);
    return;
  }
  if (k == "virtual_time") {
    set_virtual_time(v != 0);
    return;
  }
  Lock l(G.mu);
  auto& c = G.cfg;
  if (k == "total") c.total = size_t(v);
  else if (k == "h2d") c.h2d = v;
  else if (k == "d2h") c.d2h = v;
  else if (k == "pageable") c.pageable = v;
  else if (k == "latency") c.latency = v;
  else if (k == "op_seconds") c.op_seconds = v;
  else if (k == "op_factor") c.op_factor = v;
  else if (k == "poison") c.poison = int(v);
  else if (k == "pin_limit") c.pin_limit = v < 0 || v > 1e18 ? ~size_t(0) : size_t(v);
  else if (k == "pin_pow2") c.pin_pow2 = v != 0;
  else if (k == "cache_counts") c.cache_counts = v != 0;
  else if (k == "strict") c.strict = v != 0;
  else if (k == "cache_max") c.cache_max = size_t(v);
  else {
    l.unlock();
    TORCH_CHECK_VALUE(false, "simgpu: no setting named ", k);
  }
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using nogil = py::call_guard<py::gil_scoped_release>;
  m.def("init", [] {
    static auto& h = *new Hooks;
    at::RegisterPrivateUse1HooksInterface(&h);
    set_virtual_time(G.cfg.virtual_time);
  });
  m.def("get_config", &get_config, nogil());
  m.def("set_config", &set_config, nogil());
  m.def("stats", &stats, nogil());
  m.def("stream_stats", &stream_stats, nogil());
  m.def("reset_stats", &reset_stats, nogil());
  m.def("hazards", &hazards, nogil());
  m.def(
      "reset_hazards",
      [] {
        Lock l(G.mu);
        for (auto& h : G.haz) h = 0;
        G.log.clear();
      },
      nogil());
  m.def(
      "not_deferred",
      [] {
        Lock l(G.mu);
        return G.not_deferred;
      },
      nogil());
  m.def(
      "hazard_log",
      [] {
        Lock l(G.mu);
        return std::vector<std::string>(G.log.begin(), G.log.end());
      },
      nogil());
  m.def("busy", &busy, nogil());
  m.def("now", &now);
  m.def("synchronize", &sync_device, nogil());
  m.def("host_register", &host_register, nogil());
  m.def("host_unregister", &host_unregister, nogil());
  m.def(
      "leave_error",
      [](const std::string& text) {
        Lock l(G.mu);
        if (G.error.empty()) G.error = text;
      },
      nogil());
  m.def(
      "fail",
      [](const std::string& what, int64_t k) {
        Lock l(G.mu);
        if (what == "pinned") G.fail_pin = k;
        else if (what == "device") G.fail_dev = k;
        else if (what == "copy") G.fail_copy = k;
        else throw std::invalid_argument(what);
      },
      nogil());
  m.def("mem_get_info", [] { return dev_alloc.getMemoryInfo(0); }, nogil());
  m.def(
      "memory",
      [] {
        Lock l(G.mu);
        return Dict{{"allocated", double(G.allocated)},
                    {"peak_allocated", double(G.peak_allocated)},
                    {"active", double(G.active)},
                    {"peak_active", double(G.peak_active)},
                    {"cached", double(G.cached)}};
      },
      nogil());
  m.def("reset_peak", [] { dev_alloc.resetPeakStats(0); }, nogil());
  m.def("empty_cache", [] { dev_alloc.emptyCache(); }, nogil());
  m.def("current_stream_id", [] { return tl_stream; });
  // By address (torch.Event.event_id): torch.Event.elapsed_time takes no subclass of torch.Event.
  m.def("elapsed_ms", [](uintptr_t a, uintptr_t b) {
    return ev_elapsed_ms(reinterpret_cast<const Event*>(a), reinterpret_cast<const Event*>(b));
  });
  m.def("default_generator", [] { return default_gen(); });
}
