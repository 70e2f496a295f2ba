// A server of the official Go SDK: go run . PORT|stdio [REVISION...]
//
// It speaks the revisions that are named, else all that the SDK knows. Its tool `echo` says what was
// said, `count` tells progress, `ask` asks the person at the client. stderr says where it listens.
package main

import (
	"context"
	"fmt"
	"log"
	"net"
	"net/http"
	"os"

	"github.com/google/jsonschema-go/jsonschema"
	"github.com/modelcontextprotocol/go-sdk/mcp"
)

type said struct {
	Message string `json:"message"`
}

func echo(_ context.Context, _ *mcp.CallToolRequest, given said) (*mcp.CallToolResult, any, error) {
	return told("Echo: " + given.Message), nil, nil
}

type bound struct {
	To int `json:"to"`
}

func count(ctx context.Context, request *mcp.CallToolRequest, given bound) (*mcp.CallToolResult, any, error) {
	for number := 1; number <= given.To; number++ {
		progress := &mcp.ProgressNotificationParams{
			ProgressToken: request.Params.GetProgressToken(),
			Progress:      float64(number),
		}
		if err := request.Session.NotifyProgress(ctx, progress); err != nil {
			return nil, nil, err
		}
	}
	return told(fmt.Sprintf("counted to %d", given.To)), nil, nil
}

func ask(_ context.Context, request *mcp.CallToolRequest, given said) (*mcp.CallToolResult, any, error) {
	came, isAnswered := request.Params.InputResponses["form"].(*mcp.ElicitResult)
	if isAnswered {
		return told(fmt.Sprint(came.Content["answer"])), nil, nil
	}
	question := &mcp.ElicitParams{
		Mode:    "form",
		Message: given.Message,
		RequestedSchema: &jsonschema.Schema{
			Type:       "object",
			Properties: map[string]*jsonschema.Schema{"answer": {Type: "string"}},
		},
	}
	return &mcp.CallToolResult{InputRequests: mcp.InputRequestMap{"form": question}}, nil, nil
}

func told(text string) *mcp.CallToolResult {
	return &mcp.CallToolResult{Content: []mcp.Content{&mcp.TextContent{Text: text}}}
}

func main() {
	options := &mcp.ServerOptions{SupportedProtocolVersions: os.Args[2:]}
	server := mcp.NewServer(&mcp.Implementation{Name: "streamable", Version: "1"}, options)
	mcp.AddTool(server, &mcp.Tool{Name: "echo"}, echo)
	mcp.AddTool(server, &mcp.Tool{Name: "count"}, count)
	mcp.AddTool(server, &mcp.Tool{Name: "ask"}, ask)
	if os.Args[1] == "stdio" {
		log.Fatal(server.Run(context.Background(), &mcp.StdioTransport{}))
	}
	choose := func(*http.Request) *mcp.Server { return server }
	listener, err := net.Listen("tcp", "127.0.0.1:"+os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	fmt.Fprintf(os.Stderr, "listening on http://%s\n", listener.Addr())
	log.Fatal(http.Serve(listener, mcp.NewStreamableHTTPHandler(choose, nil)))
}
