// strict reads Kubernetes manifests from standard input as the API server does with strict validation:
// a kind, a field or a type that Kubernetes does not know is an error. It prints each object's kind and
// name.
package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"

	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime/serializer/json"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes/scheme"
)

func main() {
	decoder := json.NewSerializerWithOptions(json.DefaultMetaFactory, scheme.Scheme, scheme.Scheme,
		json.SerializerOptions{Yaml: true, Strict: true})
	documents := yaml.NewYAMLReader(bufio.NewReader(os.Stdin))
	failed := false
	for {
		document, err := documents.Read()
		if err == io.EOF {
			break
		}
		if err == nil && len(bytes.TrimSpace(document)) == 0 {
			continue
		}
		if err == nil {
			err = show(decoder, document)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "strict:", err)
			failed = true
		}
	}
	if failed {
		os.Exit(1)
	}
}

func show(decoder *json.Serializer, document []byte) error {
	object, kind, err := decoder.Decode(document, nil, nil)
	if err != nil {
		return err
	}
	name, err := meta.NewAccessor().Name(object)
	if err != nil {
		return err
	}
	fmt.Println(kind.Kind, name)
	return nil
}
