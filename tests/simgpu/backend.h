// What PyTorch asks of a device type: the guard and the hooks.
#pragma once
#include "fallback.h"

// ---- PyTorch's interfaces
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream wrap(int64_t id) { return c10::Stream(c10::Stream::UNSAFE, DEV, id); }
  c10::DeviceType type() const override { return PU; }
  c10::Device exchangeDevice(c10::Device) const override { return DEV; }
  c10::Device getDevice() const override { return DEV; }
  void setDevice(c10::Device d) const override { TORCH_CHECK(d.index() <= 0, "simgpu has one device"); }
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return wrap(tl_stream); }
  c10::Stream getDefaultStream(c10::Device) const override { return wrap(0); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool high) const override {
    return wrap(new_stream(high ? -1 : 0));
  }
  c10::Stream getNewStream(c10::Device, int priority) const override { return wrap(new_stream(priority)); }
  c10::Stream exchangeStream(c10::Stream s) const override {
    auto old = tl_stream;
    {
      Lock l(G.mu);
      stream(s.id());
    }
    tl_stream = s.id();
    return wrap(old);
  }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::DeviceCapability getDeviceCapability(c10::Device) const override { return {}; }
  void record(void** e, const c10::Stream& s, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (!*e) *e = new Event;
    ev_record(*static_cast<Event*>(*e), s.id());
  }
  void block(void* e, const c10::Stream& s) const override {
    if (e) ev_block(*static_cast<Event*>(e), s.id());
  }
  bool queryEvent(void* e) const override { return !e || ev_query(*static_cast<Event*>(e)); }
  void destroyEvent(void* e, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Event*>(e);
  }
  void synchronizeEvent(void* e) const override {
    if (e) ev_sync(*static_cast<Event*>(e));
  }
  double elapsedTime(void* a, void* b, const c10::DeviceIndex) const override {
    return ev_elapsed_ms(static_cast<Event*>(a), static_cast<Event*>(b));
  }
  bool queryStream(const c10::Stream& s) const override {
    Lock l(G.mu);
    auto& t = stream(s.id());
    bool d = t.completed >= t.submitted;
    if (d) G.host.merge(t.vc);
    return d;
  }
  void synchronizeStream(const c10::Stream& s) const override { sync_stream(s.id()); }
  void synchronizeDevice(const c10::DeviceIndex) const override { sync_device(); }
  void recordDataPtrOnStream(const c10::DataPtr& p, const c10::Stream& s) const override {
    DeviceAlloc::record(p, s.id());
  }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  void init() const override {}
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex d) const override { TORCH_CHECK(d <= 0, "simgpu has one device"); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void* p) const override {
    Lock l(G.mu);
    return find_pin(p, 1) != G.pins.end();
  }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pin_alloc; }
  c10::Device getDeviceFromPtr(void*) const override { return DEV; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_gen(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<SimGenerator>();
  }
  void resizePrivateUse1Bytes(const c10::Storage& s, size_t n) const override { resize_storage(s, n); }
};
