// Device memory with a capacity, and page-locked host memory.
#pragma once
#include "streams.h"

// ---- device memory
static void poison(void* p, size_t n) {
  if (G.cfg.poison >= 0 && p) std::memset(p, G.cfg.poison, n);
}

// Memory goes back to the cache. Its poison is written in the order of the stream that owns it. (G.mu held;
// inline poison is returned to the caller)
static MemP to_cache(MemP m, std::vector<MemP>& drop) {
  auto& s = stream(m->owner);
  MemP inline_poison;
  if (is_async(s) && s.completed < s.submitted) {
    if (G.cfg.poison >= 0) {
      Job j;
      j.fn = [m] { poison(m->p, m->cap); };
      enqueue(s, std::move(j));
    }
  } else inline_poison = m;
  G.cached += m->cap;
  G.cache.push_back(std::move(m));
  while (G.cached > G.cfg.cache_max && !G.cache.empty()) {
    G.cached -= G.cache.front()->cap;
    drop.push_back(G.cache.front());
    G.cache.pop_front();
  }
  return inline_poison;
}
// Ends the frees that record_stream put off and whose streams have got there. (G.mu held)
static void poll_deferred(std::vector<MemP>& todo, std::vector<MemP>& drop) {
  for (auto it = G.deferred.begin(); it != G.deferred.end();) {
    bool ready = true;
    for (auto& [s, seq] : it->until) ready = ready && stream(s).completed >= seq;
    if (!ready) {
      ++it;
      continue;
    }
    G.host.merge(it->vc);
    G.active -= it->charged;
    if (auto m = to_cache(it->mem, drop)) todo.push_back(m);
    it = G.deferred.erase(it);
  }
}
// Whether `owner`'s stream has been told to wait for all that stream `s` does with this memory: then nothing that
// it allocates later meets it, although it is still queued. (G.mu held)
static bool ordered_before(const Stream& owner, const Mem& m, int64_t s) {
  for (auto& a : m.acc)
    if (a.stream == s && owner.vc.get(size_t(s)) < a.clock) return false;
  return true;
}
static void free_block(void* v) {
  std::unique_ptr<Block> b(static_cast<Block*>(v));
  std::vector<MemP> todo, drop;
  {
    Lock l(G.mu);
    auto& m = *b->mem;
    auto& owner = stream(m.owner);
    G.allocated -= b->charged;
    G.n_free++;
    if (b->n) {
      for (auto& [s, n] : m.pend) {
        if (s == m.owner) {
          if (m.copies > 0 && !b->quiet)
            hazard(FREED_IN_FLIGHT, std::to_string(b->n) +
                                        " bytes freed before their copy on their own stream " +
                                        std::to_string(s));
        } else if (!b->recorded.count(s) && !(is_async(owner) && ordered_before(owner, m, s)))
          hazard(USE_AFTER_FREE, std::to_string(b->n) + " bytes of stream " + std::to_string(m.owner) +
                                     " freed with " + std::to_string(n) + " jobs queued on stream " +
                                     std::to_string(s) + ", without record_stream");
      }
      for (auto& a : m.acc)
        if (a.stream != m.owner && !b->recorded.count(a.stream) &&
            std::max(owner.vc.get(size_t(a.stream)), G.host.get(size_t(a.stream))) < a.clock) {
          hazard(FREE_UNORDERED, std::to_string(b->n) + " bytes of stream " + std::to_string(m.owner) +
                                     " freed while nothing orders " + a.what + " on stream " +
                                     std::to_string(a.stream) + " before their reuse");
          break;
        }
      Deferred d{b->mem, b->charged, {}, {}};
      for (int64_t s : b->recorded) {
        d.vc.merge(stream(s).vc);
        if (stream(s).completed < stream(s).submitted) d.until.push_back({s, stream(s).submitted});
      }
      if (!d.until.empty()) G.deferred.push_back(std::move(d));
      else {
        if (!b->recorded.empty()) G.host.merge(d.vc);
        G.active -= b->charged;
        if (auto p = to_cache(b->mem, drop)) todo.push_back(p);
      }
    }
    poll_deferred(todo, drop);
  }
  for (auto& m : todo) poison(m->p, m->cap);
}

struct DeviceAlloc final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t n) override {
    size_t charged = n ? (n + G.cfg.round - 1) / G.cfg.round * G.cfg.round : 0;
    std::vector<MemP> todo, drop;
    MemP m;
    bool fresh = false;
    auto b = std::make_unique<Block>();
    {
      NoGil nogil;
      Lock l(G.mu);
      poll_deferred(todo, drop);
      bool injected = n && G.fail_dev > 0 && --G.fail_dev == 0;
      // as CUDA: wait for what record_stream holds back, then try again
      if (!injected && G.active + charged > G.cfg.total && !G.deferred.empty()) {
        G.n_defer_waits++;
        for (;;) {
          const double at_once = 0;  // in virtual time an allocation costs nothing
          host_wait(l, G.wait_s, [&] {
            for (auto& d : G.deferred) {
              bool r = true;
              for (auto& [s, q] : d.until) r = r && stream(s).completed >= q;
              if (r) return true;
            }
            return G.deferred.empty();
          }, at_once);
          poll_deferred(todo, drop);
          if (G.deferred.empty() || G.active + charged <= G.cfg.total) break;
        }
      }
      if (injected || G.active + charged > G.cfg.total) {
        G.n_oom++;
        double mib = 1048576.0;
        size_t active = G.active, total = G.cfg.total;
        l.unlock();
        TORCH_CHECK_WITH(OutOfMemoryError, false, "simgpu out of memory. Tried to allocate ", n / mib,
                         " MiB. GPU 0 has a total capacity of ", total / mib, " MiB of which ",
                         (total > active ? total - active : 0) / mib,
                         " MiB is free. Of the allocated memory ", active / mib, " MiB is in use.",
                         injected ? " (injected)" : "");
      }
      if (n) {
        for (auto it = G.cache.rbegin(); it != G.cache.rend(); ++it)
          if ((*it)->cap == charged && (*it)->owner == tl_stream) {
            m = *it;
            G.cache.erase(std::next(it).base());
            G.cached -= charged;
            break;
          }
        if (G.cfg.cache_counts)
          while (G.active + charged + G.cached > G.cfg.total && !G.cache.empty()) {
            G.cached -= G.cache.front()->cap;
            drop.push_back(G.cache.front());
            G.cache.pop_front();
          }
      }
      G.n_alloc++;
      G.allocated += charged;
      G.active += charged;
      G.peak_allocated = std::max(G.peak_allocated, G.allocated);
      G.peak_active = std::max(G.peak_active, G.active);
    }
    if (!m) {
      m = std::make_shared<Mem>();
      m->p = n ? static_cast<char*>(aligned_alloc(512, (charged + 511) / 512 * 512)) : nullptr;
      m->cap = charged;
      m->owner = tl_stream;
      fresh = true;
    }
    for (auto& t : todo) poison(t->p, t->cap);
    if (fresh) poison(m->p, m->cap);
    b->mem = m;
    b->n = n;
    b->charged = charged;
    void* p = m->p;
    return {p, b.release(), &free_block, DEV};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* d, const void* s, size_t n) const override { std::memcpy(d, s, n); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t = {0, 0}) override {
    std::vector<MemP> todo, drop;
    {
      Lock l(G.mu);
      poll_deferred(todo, drop);
      for (auto& m : G.cache) drop.push_back(m);
      G.cache.clear();
      G.cached = 0;
    }
    for (auto& m : todo) poison(m->p, m->cap);
  }
  void recordStream(const c10::DataPtr& p, c10::Stream s) override { record(p, s.id()); }
  static void record(const c10::DataPtr& p, int64_t s) {
    if (p.get_deleter() != &free_block || !p.get_context()) return;
    auto* b = static_cast<Block*>(p.get_context());
    Lock l(G.mu);
    if (b->mem->owner != s) b->recorded.insert(s);
  }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex) override {
    c10::CachingDeviceAllocator::DeviceStats d;
    Lock l(G.mu);
    d.allocated_bytes[0].current = int64_t(G.allocated);
    d.allocated_bytes[0].peak = int64_t(G.peak_allocated);
    d.active_bytes[0].current = int64_t(G.active);
    d.active_bytes[0].peak = int64_t(G.peak_active);
    size_t c = G.cfg.cache_counts ? G.cached : 0;
    d.reserved_bytes[0].current = int64_t(G.active + c);
    d.reserved_bytes[0].peak = int64_t(G.peak_active + c);
    d.allocation[0].current = int64_t(G.n_alloc - G.n_free);
    d.allocation[0].allocated = int64_t(G.n_alloc);
    d.allocation[0].freed = int64_t(G.n_free);
    d.num_ooms = int64_t(G.n_oom);
    d.num_sync_all_streams = int64_t(G.n_defer_waits);
    return d;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {
    Lock l(G.mu);
    G.n_alloc = G.n_free = G.n_oom = 0;
  }
  void resetPeakStats(c10::DeviceIndex) override {
    Lock l(G.mu);
    G.peak_allocated = G.allocated;
    G.peak_active = G.active;
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override {
    std::vector<MemP> todo, drop;
    size_t used, total;
    {
      Lock l(G.mu);
      poll_deferred(todo, drop);
      used = G.active + (G.cfg.cache_counts ? G.cached : 0);
      total = G.cfg.total;
    }
    for (auto& m : todo) poison(m->p, m->cap);
    return {total > used ? total - used : 0, total};
  }
};
static DeviceAlloc& dev_alloc = *new DeviceAlloc;
REGISTER_ALLOCATOR(PU, &dev_alloc);

// The memory behind a device tensor (null for an empty one), and the bytes the tensor spans.
static MemP mem_of(const Tensor& t) {
  auto& d = t.storage().data_ptr();
  return d.get_deleter() == &free_block && d.get_context() ? static_cast<Block*>(d.get_context())->mem
                                                           : nullptr;
}
static std::pair<uintptr_t, uintptr_t> span(const Tensor& t) {
  if (t.numel() == 0) return {0, 0};
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); i++) last += (t.size(i) - 1) * t.stride(i);
  auto p = reinterpret_cast<uintptr_t>(t.data_ptr());
  return {p, p + size_t(last + 1) * t.element_size()};
}

// ---- pinned host memory
[[noreturn]] static void cuda_like(int code, const char* name, const std::string& what) {
  throw c10::AcceleratorError({__func__, __FILE__, uint32_t(__LINE__)}, code,
                              std::string("simgpu error: ") + name + "\n" + what);
}
Pin::~Pin() {
  {
    Lock l(G.mu);
    G.pinned -= charged;
  }
  std::free(p);
}
static void free_pin(void* v) {
  std::unique_ptr<PinP> h(static_cast<PinP*>(v));
  {
    Lock l(G.mu);
    (*h)->freed = true;
    G.pins.erase(reinterpret_cast<uintptr_t>((*h)->p));
    if ((*h)->pend > 0)
      hazard(PINNED_FREED, std::to_string((*h)->n) + " pinned bytes freed with " +
                               std::to_string((*h)->pend) + " copies in flight");
  }
}
struct PinnedAlloc final : at::HostAllocator {
  c10::DataPtr allocate(size_t n) override {
    size_t c = std::max<size_t>(n, 1);
    if (G.cfg.pin_pow2) {
      size_t r = 1;
      while (r < c) r *= 2;
      c = r;
    }
    {
      Lock l(G.mu);
      bool injected = G.fail_pin > 0 && --G.fail_pin == 0;
      if (injected || G.pinned + G.registered + c > G.cfg.pin_limit) {
        l.unlock();
        cuda_like(2, "out of memory",
                  injected ? "cudaHostAlloc of " + std::to_string(n) + " bytes failed (injected)"
                           : "cudaHostAlloc of " + std::to_string(n) + " bytes failed: pin limit reached");
      }
      G.pinned += c;
      G.peak_pinned = std::max(G.peak_pinned, G.pinned + G.registered);
    }
    auto p = PinP(new Pin{
        static_cast<char*>(aligned_alloc(4096, (std::max<size_t>(n, 1) + 4095) / 4096 * 4096)), n, c});
    {
      Lock l(G.mu);
      G.pins[reinterpret_cast<uintptr_t>(p->p)] = {std::max<size_t>(n, 1), p};
    }
    void* q = p->p;
    return {q, new PinP(p), &free_pin, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* d, const void* s, size_t n) const override { std::memcpy(d, s, n); }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override {
    at::HostStats s;
    Lock l(G.mu);
    s.allocated_bytes.current = int64_t(G.pinned);
    s.allocated_bytes.peak = int64_t(G.peak_pinned);
    return s;
  }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {
    Lock l(G.mu);
    G.peak_pinned = G.pinned + G.registered;
  }
};
static PinnedAlloc& pin_alloc = *new PinnedAlloc;
REGISTER_HOST_ALLOCATOR(PU, &pin_alloc);

// The pinned range that holds all of [p, p+n), or end(). (G.mu held)
static std::map<uintptr_t, Range>::iterator find_pin(const void* p, size_t n) {
  auto a = reinterpret_cast<uintptr_t>(p);
  auto it = G.pins.upper_bound(a);
  if (it == G.pins.begin()) return G.pins.end();
  --it;
  return a + n <= it->first + it->second.n && a < it->first + it->second.n ? it : G.pins.end();
}
static void host_register(uintptr_t p, size_t n) {
  Lock l(G.mu);
  if (!n || !p) {
    l.unlock();
    cuda_like(1, "invalid argument", "cudaHostRegister");
  }
  for (auto& [a, r] : G.pins)
    if (a < p + n && p < a + r.n) {
      l.unlock();
      cuda_like(712, "part or all of the requested memory range is already mapped", "cudaHostRegister");
    }
  bool injected = G.fail_pin > 0 && --G.fail_pin == 0;
  if (injected || G.pinned + G.registered + n > G.cfg.pin_limit) {
    l.unlock();
    cuda_like(2, "out of memory", "cudaHostRegister of " + std::to_string(n) + " bytes failed");
  }
  G.registered += n;
  G.peak_pinned = std::max(G.peak_pinned, G.pinned + G.registered);
  G.pins[p] = {n, nullptr};
}
static void host_unregister(uintptr_t p) {
  Lock l(G.mu);
  auto it = G.pins.find(p);
  if (it == G.pins.end() || it->second.pin) {
    l.unlock();
    cuda_like(713, "pointer does not correspond to a registered memory region", "cudaHostUnregister");
  }
  if (it->second.pend > 0)
    hazard(REGISTERED_FREED, std::to_string(it->second.n) + " bytes unregistered with " +
                                 std::to_string(it->second.pend) + " copies in flight");
  G.registered -= it->second.n;
  G.pins.erase(it);
}
// G.mu held
static void bury(Job& j) {
  if (j.pin) j.pin->pend--;
  if (j.reg) {
    auto it = G.pins.find(j.reg);
    if (it != G.pins.end() && !it->second.pin) it->second.pend--;
  }
  if (j.keep) {
    if (j.keep.use_count() == 1 && j.reg)
      hazard(REGISTERED_FREED, "registered host memory released with a copy in flight");
    G.graves.push_back(std::move(j.keep));
    j.keep = c10::Storage();
  }
}
