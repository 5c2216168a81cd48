// What the tests of the plugins share.
#pragma once

#include <cstdio>
#include <exception>
#include <functional>
#include <stdexcept>
#include <string>

inline void expect(bool ok, const std::string& what) {
  if (!ok) throw std::runtime_error("expected " + what);
}

// Runs a test, and prints how it ended.
inline bool passes(const char* name, const std::function<void()>& test) {
  try {
    test();
    std::printf("%s: ok\n", name);
    return true;
  } catch (const std::exception& error) {
    std::printf("%s: FAILED: %s\n", name, error.what());
    return false;
  }
}
