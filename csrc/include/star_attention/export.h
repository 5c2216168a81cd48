// What the libraries show: all else in them is hidden.
#pragma once

#define STAR_ATTENTION_EXPORT __attribute__((visibility("default")))
