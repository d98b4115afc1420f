// Package tig stands in for nerdctl's own test library, which the module proxy does not
// serve because it lives in a nested module without a release. nerdctl's program links the
// library by accident (a helper of its tests is in a non-test file) and uses one interface
// of it, this one; no code path of the program calls it.
package tig

// T is the part of testing.T that nerdctl's test helpers name.
type T interface {
	Log(args ...any)
	FailNow()
}
