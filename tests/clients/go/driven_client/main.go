// A client of the official Go SDK that does in one session what its standard input says. As
// driven_client.py does for Python.
//
//	driven_client URL
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"log"
	"os"

	"github.com/modelcontextprotocol/go-sdk/mcp"
)

type command struct {
	Tool      string
	Arguments map[string]any
	Notify    bool
}

func say(outcome string) {
	line, _ := json.Marshal(map[string]string{"outcome": outcome})
	fmt.Println(string(line))
}

func done(ctx context.Context, session *mcp.ClientSession, given command) string {
	if given.Notify {
		told := &mcp.ProgressNotificationParams{ProgressToken: "nobody's", Progress: 1}
		if err := session.NotifyProgress(ctx, told); err != nil {
			return "failed: " + err.Error()
		}
		return "sent"
	}
	result, err := session.CallTool(ctx, &mcp.CallToolParams{Name: given.Tool, Arguments: given.Arguments})
	if err != nil {
		return "failed: " + err.Error()
	}
	text := result.Content[0].(*mcp.TextContent).Text
	if result.IsError {
		return "failed: " + text
	}
	return text
}

func main() {
	ctx := context.Background()
	client := mcp.NewClient(&mcp.Implementation{Name: "test", Version: "1"}, nil)
	session, err := client.Connect(ctx, &mcp.StreamableClientTransport{Endpoint: os.Args[1]}, nil)
	if err != nil {
		log.Fatal(err)
	}
	say("ready")
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		var given command
		if err := json.Unmarshal(lines.Bytes(), &given); err != nil {
			log.Fatal(err)
		}
		say(done(ctx, session, given))
	}
	session.Close()
}
